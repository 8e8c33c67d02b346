import XCTest

@testable import LlamaBundle

final class ParityTests: XCTestCase {
    /// One row of a vocabulary of 3, of which two are kept.
    private func golden(_ logits: [Float]) -> GoldenLogits {
        let sum = Float(log(logits.reduce(0) { $0 + exp(Double($1)) }))
        return GoldenLogits(kept: 2, topIDs: [0, 1], topLogits: Array(logits[..<2]), logSumExp: [sum])
    }

    private func logs(_ probabilities: [Double]) -> [Float] { probabilities.map { Float(log($0)) } }

    func testKLByHand() throws {
        let row = try golden(logs([0.5, 0.25, 0.25])).compare(logs([0.25, 0.25, 0.5]), row: 0)
        // 0.5 ln 2 + 0.25 ln 1 + 0.25 ln 0.5, the last of them the bin of all others
        XCTAssertEqual(row.kl, 0.25 * log(2.0), accuracy: 1e-7)
        XCTAssertEqual(row.furthest, log(2.0), accuracy: 1e-6)
        XCTAssertFalse(row.agrees)
    }

    func testAShiftOfAllLogitsIsNoDivergence() throws {
        let row = try golden([2, 1, 0]).compare([5, 4, 3], row: 0)
        XCTAssertEqual(row.kl, 0, accuracy: 1e-6)
        XCTAssertEqual(row.furthest, 3)
        XCTAssertTrue(row.agrees)
    }

    func testTheBinOfAllOthersIsNeverEmpty() throws {
        let logits = GoldenLogits(kept: 2, topIDs: [0, 1], topLogits: [0, 0], logSumExp: [Float(log(2.0))])
        let row = try logits.compare([0, 0, -200], row: 0)
        XCTAssertEqual(row.kl, 0, accuracy: 1e-6)
        // p keeps 1e-12 beside its two; q gives half to the third: 2 * 0.5 ln(0.5 / 0.25) and nearly nothing more
        let other = try logits.compare([0, 0, Float(log(2.0))], row: 0)
        XCTAssertEqual(other.kl, log(2.0), accuracy: 1e-6)
    }

    func testDecidedIsMoreThanTwoSpacingsOfFP16() throws {
        let spacing: Float = 1 / 128  // of fp16 at 9: 2^(3 - 10)
        XCTAssertFalse(try golden([9, 9 - 2 * spacing, 0]).compare([0, 1, 0], row: 0).decided)
        XCTAssertTrue(try golden([9, 9 - 2.5 * spacing, 0]).compare([0, 1, 0], row: 0).decided)
        XCTAssertTrue(try golden([-9, -9 - 2.5 * spacing, -20]).compare([0, 1, 0], row: 0).decided)
        XCTAssertTrue(try golden([0, -0x1p-22, -1]).compare([0, 1, 0], row: 0).decided)
    }

    func testNoDecidedPositionIsFullAgreement() throws {
        let parity = Parity([try golden([9, 9, 0]).compare([0, 1, 0], row: 0)])
        XCTAssertEqual(parity.decidedPositions, 0)
        XCTAssertEqual(parity.decidedTop1Agreement, 1)
        XCTAssertEqual(parity.top1Agreement, 0)
    }

    func testLogitsThatAreNoNumbersStopTheTest() {
        XCTAssertTrue(message { try golden([2, 1, 0]).compare([.nan, 0, 0], row: 0) }.contains("golden row 0"))
        XCTAssertTrue(message { try golden([2, 1, 0]).compare([1], row: 0) }.contains("gives 1 logits"))
    }

    func testTheMaskLetsAQueryLookAtItselfAndBack() {
        let no: UInt16 = 0xFC00
        XCTAssertEqual(causalMask(position: 0, end: 3), [0, no, no, 0, 0, no, 0, 0, 0])
        XCTAssertEqual(causalMask(position: 2, end: 4), [0, 0, 0, no, 0, 0, 0, 0])
        XCTAssertEqual(causalMask(position: 3, end: 4), [0, 0, 0, 0])
    }
}

final class SelfTestTests: XCTestCase {
    private struct Letters: Tokenizer {
        let wrong: Bool
        func encode(_ text: String) -> [Int] { wrong ? [] : [text.contains("S:") ? 2 : 1] }
        func bytes(of id: Int) -> [UInt8] { [] }
    }

    private let device = DeviceReport.Device(model: "m", os: "o", runtime: "r", app: "a")

    private func tiny() throws -> ModelBundle {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        return try ModelBundle(folder: folder)
    }

    func testARunnerThatSaysWhatTheGoldensSayPasses() throws {
        let bundle = try tiny()
        let fake = FakeRunner()
        var runner: any Runner = fake
        let report = try SelfTest(bundle, tokenizer: Letters(wrong: false)).run(
            &runner, device: device, loadSeconds: 0.5, threads: 2)
        XCTAssertEqual(report.parity.positions, 4)
        XCTAssertEqual(report.parity.meanKL, 0, accuracy: 1e-6)
        XCTAssertEqual(report.parity.maxAbsLogitDifference, 0)
        XCTAssertEqual(report.parity.decidedTop1Agreement, 1)
        XCTAssertEqual(report.parity.decidedPositions, 4)
        XCTAssertEqual(report.greedy, Agreement(prompts: 1, compared: 2, agreeing: 2))
        XCTAssertEqual(report.chats, Agreement(compared: 2, agreeing: 2))
        XCTAssertEqual(report.faults(for: bundle.manifest), [])
        XCTAssertEqual(
            Array(fake.log.calls.prefix(7)),
            ["rewind 0", "feed [0, 1]", "feed [2, 3]", "rewind 2", "feed [2, 3]", "feed [0]", "feed [1]"])
    }

    func testTheWorstPositionHasABoundOfItsOwnAndWhatIsNoNumberMissesIt() throws {
        let bundle = try tiny()
        var runner: any Runner = FakeRunner()
        var report = try SelfTest(bundle).run(&runner, device: device)
        XCTAssertEqual(report.faults(for: bundle.manifest), [])
        report.parity.worstKL = 0.011
        XCTAssertEqual(
            report.faults(for: bundle.manifest),
            ["KL at the worst position is 0.011 nats, at most 0.01 was expected"])
        report.parity.worstKL = .nan
        report.parity.meanKL = .nan
        XCTAssertEqual(report.faults(for: bundle.manifest).count, 2)
    }

    func testARunnerWithTwoLogitsSwappedFails() throws {
        let bundle = try tiny()
        var fake = FakeRunner()
        fake.says = {
            var logits = TinyBundle.logits(after: $0.last!, at: $0.count - 1)
            logits.swapAt(0, 1)
            return logits
        }
        var runner: any Runner = fake
        let report = try SelfTest(bundle).run(&runner, device: device)
        XCTAssertGreaterThan(report.parity.meanKL, 0.1)
        XCTAssertEqual(report.parity.top1Agreement, 0.5)  // 2, 0, 1, 2 are the likeliest: two of them are swapped
        XCTAssertEqual(report.greedy, Agreement(prompts: 1, compared: 1, agreeing: 0))
        let faults = report.faults(for: bundle.manifest)
        XCTAssertTrue(faults[0].contains("at most 0.001 was expected"), faults[0])
        XCTAssertTrue(faults[1].hasPrefix("KL at the worst position is "), faults[1])
        XCTAssertTrue(faults[2].contains("0 of 1 greedy tokens agree"), faults[2])
    }

    func testARunnerThatForgetsToRewindFails() throws {
        struct Forgetful: Runner {
            var cached = 0
            mutating func rewind(to position: Int) { cached = position == 0 ? 0 : cached }
            mutating func feed(_ ids: [Int]) -> [Float] {
                cached += ids.count
                return TinyBundle.logits(after: ids.last!, at: cached - 1)
            }
        }
        let bundle = try tiny()
        var runner: any Runner = Forgetful()
        let parity = try SelfTest(bundle).parity(&runner)
        XCTAssertEqual(parity.maxAbsLogitDifference, 0.5)  // two positions further, a quarter each
    }

    func testIDsOfATokenizerCount() throws {
        let chats = try SelfTest(try tiny(), tokenizer: Letters(wrong: true)).chats()
        XCTAssertEqual(chats, Agreement(compared: 2, agreeing: 0))
    }

    func testTheMedianOfAnEvenNumberLiesBetween() {
        XCTAssertEqual(median([3, 1, 2]), 2)
        XCTAssertEqual(median([4, 1, 3, 2]), 2.5)
    }

    func testTheReportHasEveryFieldAndNullForWhatWasNotMeasured() throws {
        let bundle = try tiny()
        var runner: any Runner = FakeRunner()
        var report = try SelfTest(bundle).run(&runner, device: device)
        report.chats = .notMeasured("no format")
        let url = try scratch().appendingPathComponent("device-report.json")
        try report.write(to: url)
        XCTAssertEqual(try JSONDecoder().decode(DeviceReport.self, from: Data(contentsOf: url)), report)
        let json = try XCTUnwrap(JSONSerialization.jsonObject(with: Data(contentsOf: url)) as? [String: Any])
        XCTAssertEqual(
            Set(json.keys),
            ["schema", "manifest_sha256", "device", "parity", "greedy", "chats", "latency", "peak_memory_bytes"])
        XCTAssertEqual(json["schema"] as? String, "llama-export/device-report/1")
        XCTAssertEqual(json["manifest_sha256"] as? String, bundle.manifestSHA256)
        XCTAssertTrue(json["peak_memory_bytes"] is NSNull)
        let latency = try XCTUnwrap(json["latency"] as? [String: Any])
        XCTAssertEqual(
            Set(latency.keys),
            [
                "load_s", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "prompt_tokens",
                "decoded_tokens", "threads", "runs",
            ])
        XCTAssertTrue(latency["load_s"] is NSNull)
        XCTAssertEqual(latency["runs"] as? Int, 3)
        let chats = try XCTUnwrap(json["chats"] as? [String: Any])
        XCTAssertTrue(chats["compared"] is NSNull)
        XCTAssertEqual(chats["reason"] as? String, "no format")
        XCTAssertEqual(
            Set(try XCTUnwrap(json["parity"] as? [String: Any]).keys),
            [
                "positions", "mean_kl_nats", "worst_kl_nats", "top1_agreement", "decided_top1_agreement", "decided_positions",
                "max_abs_logit_diff",
            ])
    }

    func testGoldensThatDoNotFitTogetherAreRefused() throws {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        let goldens = TinyBundle.goldens.replacingOccurrences(of: "[2, 2]", with: "[2, 3]")
        try TinyBundle.text(goldens, to: folder, "goldens.json")
        try TinyBundle.writeManifest(in: folder)
        let bundle = try ModelBundle(folder: folder)
        XCTAssertTrue(message { try bundle.goldens() }.contains("do not fit together: prefills [2, 3]"))
    }

    func testPeakMemoryIsThatOfThisProcess() throws {
        let bytes = try XCTUnwrap(peakMemoryBytes())
        XCTAssertTrue((1_000_000...10_000_000_000).contains(bytes), "\(bytes)")
    }
}

final class GenerationTests: XCTestCase {
    private struct Digits: Tokenizer {
        func encode(_ text: String) -> [Int] { text.compactMap(\.wholeNumberValue) }
        /// One emoji over the tokens 1 and 2.
        func bytes(of id: Int) -> [UInt8] { [[], [0xF0, 0x9F], [0x99, 0x82], [0x33]][id] }
    }

    private func bundle() throws -> ModelBundle {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        return try ModelBundle(folder: folder)
    }

    private func generate(_ session: inout Session, _ prompt: [Int], limit: Int = .max) throws -> ([Int], Session.End) {
        var (sampler, received) = (Sampler(), [Int]())
        let end = try session.generate(after: prompt, limit: limit, sampler: &sampler) {
            received.append($0)
            return true
        }
        return (received, end)
    }

    func testAnAnswerEndsAtAStopTokenWhichIsNotPassedOn() throws {
        var session = Session(FakeRunner(), manifest: try bundle().manifest)
        let (ids, end) = try generate(&session, [0])
        XCTAssertEqual(ids, [1, 2])
        XCTAssertEqual(end, .stopToken)
        XCTAssertEqual(try generate(&session, [0], limit: 1).1, .limit)
    }

    func testAnAnswerEndsWithTheContextFull() throws {
        var fake = FakeRunner()
        fake.says = { _ in [0, 1, 0, 0] }
        var session = Session(fake, manifest: try bundle().manifest)
        let (ids, end) = try generate(&session, [0, 0])
        XCTAssertEqual(ids.count, 15)  // the last of them was chosen from the logits of position 15 and is not fed
        XCTAssertEqual(end, .context)
        let said = message { try generate(&session, Array(repeating: 0, count: 16)) }
        XCTAssertTrue(said.contains("the prompt has 16 tokens, 1 to 15 fit"), said)
    }

    func testAConversationThatGoesOnFeedsOnlyWhatIsNew() throws {
        let fake = FakeRunner()
        var session = Session(fake, manifest: try bundle().manifest)
        _ = try generate(&session, [0])
        fake.log.calls = []
        _ = try generate(&session, [0, 1, 2, 0, 1])
        XCTAssertEqual(Array(fake.log.calls.prefix(2)), ["rewind 3", "feed [0, 1]"])
        fake.log.calls = []
        _ = try generate(&session, [0, 1])  // all of it is in the cache: its last token has to be fed again
        XCTAssertEqual(Array(fake.log.calls.prefix(2)), ["rewind 1", "feed [1]"])
    }

    func testAnAssistantStreamsWholeCharactersAndTestsItself() async throws {
        let assistant = try await Assistant(bundle: try bundle(), tokenizer: Digits()) { _ in FakeRunner() }
        var pieces: [String] = []
        for try await piece in assistant.answer(to: [Message(.user, "0")]) { pieces.append(piece) }
        XCTAssertEqual(pieces, ["🙂"])
        let device = DeviceReport.Device.current(runtime: "none", app: "tests")
        let report = try await assistant.test(device: device)
        XCTAssertEqual(report.parity.maxAbsLogitDifference, 0)
        XCTAssertNotNil(report.latency.loadSeconds)
        XCTAssertFalse(report.device.model.isEmpty)
        pieces = []
        for try await piece in assistant.answer(to: [Message(.user, "0")]) { pieces.append(piece) }
        XCTAssertEqual(pieces, ["🙂"])
    }

    func testAnAssistantPassesOnWhatWentWrong() async throws {
        let assistant = try await Assistant(bundle: try bundle(), tokenizer: Digits()) { _ in FakeRunner() }
        do {
            for try await _ in assistant.answer(to: [Message(.assistant, "0")]) {}
            XCTFail("nothing was thrown")
        } catch {
            XCTAssertTrue("\(error)".contains("the user last"))
        }
    }
}
