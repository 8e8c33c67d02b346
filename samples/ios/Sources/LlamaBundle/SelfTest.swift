import Foundation

/// Drives an artifact over the goldens of its bundle: parity, greedy answers, chats and latency.
public struct SelfTest {
    /// Beyond a choice that is nearer than this another processor may rightly choose otherwise.
    static let clearMargin = 0.25
    static let promptTokens = 128
    static let decodedTokens = 32
    static let runs = 3

    private let bundle: ModelBundle
    private let goldens: Goldens
    private let tokenizer: (any Tokenizer)?

    /// Throws `BundleError` where the goldens are missing or broken.
    public init(_ bundle: ModelBundle, tokenizer: (any Tokenizer)? = nil) throws {
        self.bundle = bundle
        self.tokenizer = tokenizer
        goldens = try bundle.goldens()
    }

    /// All of it. `progress` is told what is under way; what is known beforehand (seconds to load, threads) is passed
    /// on to the report.
    public func run(
        _ runner: inout any Runner,
        device: DeviceReport.Device,
        loadSeconds: Double? = nil,
        threads: Int? = nil,
        peakMemory: () -> Int? = { nil },
        progress: (String) -> Void = { _ in }
    ) throws -> DeviceReport {
        progress("comparing logits")
        let parity = try parity(&runner)
        progress("answering prompts")
        let greedy = try greedy(&runner)
        progress("rendering chats")
        let chats = try chats()
        progress("measuring latency")
        let latency = try latency(&runner, loadSeconds: loadSeconds, threads: threads)
        return DeviceReport(
            manifestSHA256: bundle.manifestSHA256,
            device: device,
            parity: parity,
            greedy: greedy,
            chats: chats,
            latency: latency,
            peakMemoryBytes: peakMemory())
    }

    /// Two prefills, the second on a cache that is not empty and again after a rewind, then one token at a time.
    public func parity(_ runner: inout any Runner) throws -> Parity {
        let (first, second) = (goldens.prefills.first, goldens.prefills.first + goldens.prefills.second)
        let ids = goldens.ids
        var rows: [RowFigures] = []
        func keep(_ logits: [Float]) throws { rows.append(try goldens.logits.compare(logits, row: rows.count)) }

        try runner.rewind(to: 0)
        try keep(try runner.feed(Array(ids[..<first])))
        _ = try runner.feed(Array(ids[first..<second]))
        try runner.rewind(to: first)
        try keep(try runner.feed(Array(ids[first..<second])))
        for id in ids[second...] { try keep(try runner.feed([id])) }
        return Parity(rows)
    }

    /// Each prompt's greedy answer, up to the first unclear token and up to the first that differs.
    public func greedy(_ runner: inout any Runner) throws -> Agreement {
        var (compared, agreeing) = (0, 0)
        for prompt in goldens.prompts {
            try runner.rewind(to: 0)
            var next = prompt.ids
            for (wanted, margin) in zip(prompt.greedyIDs, prompt.greedyMargins) {
                guard margin >= SelfTest.clearMargin else { break }
                let found = Sampler.best(of: try runner.feed(next))
                compared += 1
                guard found == wanted else { break }
                agreeing += 1
                next = [found]
            }
        }
        return Agreement(prompts: goldens.prompts.count, compared: compared, agreeing: agreeing)
    }

    /// Golden renders whose text, and whose ids where there is a tokenizer, come out as in the bundle.
    public func chats() throws -> Agreement {
        guard !goldens.chats.isEmpty else { return .notMeasured("the bundle has no golden chats") }
        guard let format = try bundle.chatFormat() else {
            return .notMeasured("the bundle has no chat_format.json: its template cannot be told as text")
        }
        let agreeing = try goldens.chats.filter { chat in
            guard let text = try? format.render(chat.messages), sameBytes(text, chat.text) else { return false }
            return try tokenizer.map { try $0.encode(text) == chat.ids } ?? true
        }
        return Agreement(compared: goldens.chats.count, agreeing: agreeing.count)
    }

    /// Medians over some runs of a prefill and some decoding, after one that warms up.
    public func latency(_ runner: inout any Runner, loadSeconds: Double?, threads: Int?) throws -> Latency {
        let context = bundle.manifest.context
        let prompt = Array(goldens.ids.prefix(min(SelfTest.promptTokens, max(1, context / 2))))
        let room = min(SelfTest.decodedTokens, context - prompt.count)
        let decoded = Array(goldens.ids.dropFirst(prompt.count).prefix(room))
        let clock = ContinuousClock()
        var (prefills, decodes): ([Double], [Double]) = ([], [])
        for run in 0...SelfTest.runs {
            try runner.rewind(to: 0)
            let prefill = try clock.measure { _ = try runner.feed(prompt) }
            let decode = try clock.measure { for id in decoded { _ = try runner.feed([id]) } }
            guard run > 0 else { continue }
            prefills.append(prefill.inSeconds)
            decodes.append(decode.inSeconds)
        }
        return Latency(
            loadSeconds: loadSeconds,
            timeToFirstTokenMilliseconds: 1e3 * median(prefills),
            prefillTokensPerSecond: Double(prompt.count) / median(prefills),
            decodeTokensPerSecond: decoded.isEmpty ? nil : Double(decoded.count) / median(decodes),
            promptTokens: prompt.count,
            decodedTokens: decoded.count,
            threads: threads,
            runs: SelfTest.runs)
    }
}

/// The middle value; of an even number of them the mean of the middle two.
func median(_ values: [Double]) -> Double {
    let sorted = values.sorted()
    let middle = sorted.count / 2
    return sorted.count.isMultiple(of: 2) ? (sorted[middle - 1] + sorted[middle]) / 2 : sorted[middle]
}

extension Duration {
    /// As a number; of use for whatever takes less than years.
    public var inSeconds: Double { Double(components.seconds) + Double(components.attoseconds) * 1e-18 }
}
