import XCTest

@testable import LlamaBundle

final class SamplerTests: XCTestCase {
    private let logits: [Float] = [0, 2, -1, 2, 1]

    private func counts(_ sampling: Sampling, seed: UInt64 = 1, draws: Int = 4000) -> [Int: Int] {
        var sampler = Sampler(sampling, seed: seed)
        return (0..<draws).reduce(into: [:]) { found, _ in found[sampler.choose(from: logits), default: 0] += 1 }
    }

    func testGreedyTakesTheFirstOfTheBest() {
        XCTAssertEqual(counts(.greedy), [1: 4000])
    }

    func testTheSameSeedGivesTheSameTokensAndAnotherDoesNot() {
        func draws(_ seed: UInt64) -> [Int] {
            var sampler = Sampler(Sampling(temperature: 1), seed: seed)
            return (0..<50).map { _ in sampler.choose(from: logits) }
        }
        XCTAssertEqual(draws(7), draws(7))
        XCTAssertNotEqual(draws(7), draws(8))
    }

    /// The first numbers of the author's own program for the seed 1234567.
    func testTheGeneratorIsSplitMix64() {
        var generator = SplitMix64(state: 1_234_567)
        XCTAssertEqual(
            (0..<3).map { _ in generator.next() },
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423])
    }

    func testFrequenciesAreTheSoftmaxAtThatTemperature() {
        for temperature in [0.5, 1, 2] {
            let found = counts(Sampling(temperature: temperature))
            let weights = logits.map { exp(Double($0) / temperature) }
            for (id, weight) in weights.enumerated() {
                let wanted = weight / weights.reduce(0, +)
                let deviation = (wanted * (1 - wanted) / 4000).squareRoot()
                XCTAssertEqual(Double(found[id] ?? 0) / 4000, wanted, accuracy: 5 * deviation)
            }
        }
    }

    func testTopKKeepsTheBestK() {
        XCTAssertEqual(Set(counts(Sampling(temperature: 2, topK: 3)).keys), [1, 3, 4])
        XCTAssertEqual(Set(counts(Sampling(temperature: 2, topK: 1)).keys), [1])
        XCTAssertEqual(Set(counts(Sampling(temperature: 2, topK: 99)).keys), [0, 1, 2, 3, 4])
    }

    func testTopKIsTheBeginningOfTheSortedList() {
        var generator = SplitMix64(state: 3)
        for _ in 0..<50 {
            let logits = (0..<40).map { _ in Float(generator.next() % 9) }
            let sorted = logits.indices.sorted { logits[$0] > logits[$1] || (logits[$0] == logits[$1] && $0 < $1) }
            for k in [1, 2, 17, 40] { XCTAssertEqual(Sampler.top(k, of: logits), Array(sorted.prefix(k))) }
        }
    }

    func testTopPKeepsTheFewestThatReachIt() {
        // Probabilities in order: 0.36, 0.36, 0.13, 0.05, 0.02 of 1 (rounded).
        XCTAssertEqual(Set(counts(Sampling(temperature: 1, topP: 0.3)).keys), [1])
        XCTAssertEqual(Set(counts(Sampling(temperature: 1, topP: 0.6)).keys), [1, 3])
        XCTAssertEqual(Set(counts(Sampling(temperature: 1, topP: 0.9)).keys), [1, 3, 4])
        XCTAssertEqual(Set(counts(Sampling(temperature: 1, topP: 0)).keys), [1])
    }

    func testAGenerationConfigThatDoesNotSampleIsGreedy() throws {
        func sampling(_ json: String) throws -> Sampling {
            try JSONDecoder().decode(Sampling.self, from: Data(json.utf8))
        }
        XCTAssertEqual(try sampling(#"{"temperature": 0.6}"#), .greedy)
        XCTAssertEqual(
            try sampling(#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9}"#),
            Sampling(temperature: 0.6, topP: 0.9))
    }
}
