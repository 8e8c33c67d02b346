/// A runner and the tokens in its cache, so that a conversation that goes on feeds only what is new.
public struct Session {
    /// Why an answer ended.
    public enum End: Equatable, Sendable {
        /// At a token that ends answers.
        case stopToken
        /// At the number of tokens that was asked for.
        case limit
        /// With the cache full.
        case context
        /// Whoever received it had enough.
        case stopped
    }

    private let manifest: Manifest
    private var runner: any Runner
    private var cached: [Int] = []

    public init(_ runner: any Runner, manifest: Manifest) {
        self.runner = runner
        self.manifest = manifest
    }

    /// Continue `prompt` token by token, with each passed to `receive` until it answers false. The token that ends the
    /// answer is not passed on. Throws `BundleError` for a prompt that leaves no room to answer.
    public mutating func generate(
        after prompt: [Int], limit: Int = .max, sampler: inout Sampler, receive: (Int) throws -> Bool
    ) throws -> End {
        guard !prompt.isEmpty, prompt.count < manifest.context else {
            throw BundleError(
                "the prompt has \(prompt.count) tokens, 1 to \(manifest.context - 1) fit the context",
                hint: "shorten the conversation, or export with a larger --context")
        }
        var next = try forgetAllBut(prompt)
        for _ in 0..<limit {
            let logits = try feed(next)
            let token = sampler.choose(from: logits)
            if manifest.model.endTokens.contains(token) { return .stopToken }
            guard try receive(token) else { return .stopped }
            guard cached.count < manifest.context else { return .context }
            next = [token]
        }
        return .limit
    }

    /// Run some other work on the runner, after which nothing is in the cache.
    public mutating func withRunner<T>(_ body: (inout any Runner) throws -> T) throws -> T {
        cached = []
        defer { try? runner.rewind(to: 0) }
        return try body(&runner)
    }

    /// Rewind to what the cache has in common with `prompt`; what of it is still to be fed, at least its last token.
    private mutating func forgetAllBut(_ prompt: [Int]) throws -> [Int] {
        let common = zip(cached, prompt.dropLast()).prefix { $0 == $1 }.count
        try runner.rewind(to: common)
        cached.removeSubrange(common...)
        return Array(prompt[common...])
    }

    private mutating func feed(_ ids: [Int]) throws -> [Float] {
        let logits = try runner.feed(ids)
        cached += ids
        return logits
    }
}

/// A bundle that is loaded and answers, one question after the other, off the main actor.
public actor Assistant {
    public nonisolated let bundle: ModelBundle
    private let tokenizer: any Tokenizer
    private let format: ChatFormat
    private let loadSeconds: Double
    private let threads: Int?
    private var session: Session
    private var sampler: Sampler

    /// Loads the artifact with `load`. Throws `BundleError` for a bundle without a chat format.
    public init(
        bundle: ModelBundle,
        tokenizer: any Tokenizer,
        seed: UInt64 = 0,
        threads: Int? = nil,
        load: @Sendable (ModelBundle) async throws -> any Runner
    ) async throws {
        guard let format = try bundle.chatFormat() else {
            throw BundleError(
                "the bundle has no chat_format.json: its template cannot be told as text",
                hint: "render chat_template.jinja with a Jinja library, and use Session")
        }
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.format = format
        self.threads = threads
        sampler = Sampler(try bundle.sampling(), seed: seed)
        let started = ContinuousClock.now
        session = Session(try await load(bundle), manifest: bundle.manifest)
        loadSeconds = (ContinuousClock.now - started).inSeconds
    }

    /// The self-test over the bundle's goldens.
    public func test(
        device: DeviceReport.Device, progress: @escaping @Sendable (String) -> Void = { _ in }
    ) throws -> DeviceReport {
        let test = try SelfTest(bundle, tokenizer: tokenizer)
        return try session.withRunner { runner in
            try test.run(
                &runner, device: device, loadSeconds: loadSeconds, threads: threads, peakMemory: peakMemoryBytes,
                progress: progress)
        }
    }

    /// The answer to a conversation, as it is written. It ends early when nobody listens any more.
    public nonisolated func answer(
        to messages: [Message], limit: Int = .max
    ) -> AsyncThrowingStream<String, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.write(messages, limit: limit) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func write(_ messages: [Message], limit: Int, to receive: (String) -> Void) throws {
        let prompt = try tokenizer.encode(try format.render(messages))
        var text = UTF8Stream()
        _ = try session.generate(after: prompt, limit: limit, sampler: &sampler) { token in
            let piece = text.append(tokenizer.bytes(of: token))
            if !piece.isEmpty { receive(piece) }
            return !Task.isCancelled
        }
        let rest = text.finish()
        if !rest.isEmpty { receive(rest) }
    }
}
