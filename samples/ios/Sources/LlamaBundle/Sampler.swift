import Foundation

/// How the next token is chosen, with the fields of `generation_config.json`.
public struct Sampling: Equatable, Sendable {
    /// 0: always the most likely token.
    public var temperature: Double
    /// Only the k most likely tokens; 0: all.
    public var topK: Int
    /// Only the most likely tokens that together have this probability.
    public var topP: Double

    public init(temperature: Double, topK: Int = 0, topP: Double = 1) {
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
    }

    public static let greedy = Sampling(temperature: 0)
}

extension Sampling: Decodable {
    enum CodingKeys: String, CodingKey {
        case temperature
        case samples = "do_sample"
        case topK = "top_k"
        case topP = "top_p"
    }

    public init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        guard try fields.decodeIfPresent(Bool.self, forKey: .samples) ?? false else {
            self = .greedy
            return
        }
        self.init(
            temperature: try fields.decodeIfPresent(Double.self, forKey: .temperature) ?? 1,
            topK: try fields.decodeIfPresent(Int.self, forKey: .topK) ?? 0,
            topP: try fields.decodeIfPresent(Double.self, forKey: .topP) ?? 1)
    }
}

/// Chooses tokens. The same seed and the same logits give the same tokens, on every device.
public struct Sampler: Sendable {
    public let sampling: Sampling
    private var generator: SplitMix64

    public init(_ sampling: Sampling = .greedy, seed: UInt64 = 0) {
        self.sampling = sampling
        generator = SplitMix64(state: seed)
    }

    /// A token id for logits `[V]`, which must not be empty.
    public mutating func choose(from logits: [Float]) -> Int {
        guard sampling.temperature > 0 else { return Sampler.best(of: logits) }
        let kept = sampling.topK > 0 ? Sampler.top(sampling.topK, of: logits) : Sampler.sorted(logits)
        let highest = Double(logits[kept[0]])
        var weights = kept.map { exp((Double(logits[$0]) - highest) / sampling.temperature) }
        weights.removeLast(weights.count - nucleus(weights))
        var rest = generator.nextUnit() * weights.reduce(0, +)
        for (id, weight) in zip(kept, weights) {
            rest -= weight
            if rest < 0 { return id }
        }
        return kept[weights.count - 1]
    }

    /// How many of the first tokens together reach `topP`; at least one.
    private func nucleus(_ weights: [Double]) -> Int {
        guard sampling.topP < 1 else { return weights.count }
        let wanted = sampling.topP * weights.reduce(0, +)
        var sum = 0.0
        for (index, weight) in weights.enumerated() {
            sum += weight
            if sum >= wanted { return index + 1 }
        }
        return weights.count
    }

    /// The most likely token; of equals the first.
    public static func best(of logits: [Float]) -> Int {
        var best = 0
        logits.withUnsafeBufferPointer { logits in
            for id in logits.indices where logits[id] > logits[best] { best = id }
        }
        return best
    }

    /// The `count` most likely tokens, best first; of equals the one with the lower id first.
    static func top(_ count: Int, of logits: [Float]) -> [Int] {
        var kept: [Int] = []
        for id in logits.indices where kept.count < count || logits[id] > logits[kept[kept.count - 1]] {
            var (low, high) = (0, kept.count)
            while low < high {
                let middle = (low + high) / 2
                if logits[kept[middle]] >= logits[id] { low = middle + 1 } else { high = middle }
            }
            kept.insert(id, at: low)
            if kept.count > count { kept.removeLast() }
        }
        return kept
    }

    private static func sorted(_ logits: [Float]) -> [Int] {
        logits.indices.sorted { logits[$0] > logits[$1] || (logits[$0] == logits[$1] && $0 < $1) }
    }
}

/// Sebastiano Vigna's SplitMix64 (https://prng.di.unimi.it/splitmix64.c).
struct SplitMix64: Sendable {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// Evenly in [0, 1), of 53 bits.
    mutating func nextUnit() -> Double { Double(next() >> 11) * 0x1p-53 }
}
