import Foundation

/// How many of what was compared came out as the reference has it; without figures, why not.
public struct Agreement: Equatable, Sendable {
    public var prompts: Int?
    public var compared: Int?
    public var agreeing: Int?
    public var reason: String?

    public init(prompts: Int? = nil, compared: Int, agreeing: Int) {
        (self.prompts, self.compared, self.agreeing, reason) = (prompts, compared, agreeing, nil)
    }

    public static func notMeasured(_ reason: String) -> Agreement {
        var agreement = Agreement(compared: 0, agreeing: 0)
        (agreement.compared, agreement.agreeing, agreement.reason) = (nil, nil, reason)
        return agreement
    }
}

/// Medians over `runs`; nil is what was not measured.
public struct Latency: Equatable, Sendable {
    public var loadSeconds: Double?
    public var timeToFirstTokenMilliseconds: Double?
    public var prefillTokensPerSecond: Double?
    public var decodeTokensPerSecond: Double?
    public var promptTokens: Int
    public var decodedTokens: Int
    public var threads: Int?
    public var runs: Int
}

/// What an app writes after its self-test, for `llama-export validate BUNDLE --device-report F`.
public struct DeviceReport: Equatable, Sendable {
    public struct Device: Codable, Equatable, Sendable {
        public var model: String
        public var os: String
        public var runtime: String
        public var app: String

        public init(model: String, os: String, runtime: String, app: String) {
            (self.model, self.os, self.runtime, self.app) = (model, os, runtime, app)
        }
    }

    static let schema = "llama-export/device-report/1"

    public var manifestSHA256: String
    public var device: Device
    public var parity: Parity
    public var greedy: Agreement
    public var chats: Agreement
    public var latency: Latency
    public var peakMemoryBytes: Int?

    /// The report as JSON, the same bytes for the same figures.
    public func json() throws -> Data {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        return try encoder.encode(self) + Data("\n".utf8)
    }

    /// Whole or not at all.
    public func write(to url: URL) throws { try json().write(to: url, options: .atomic) }

    /// What misses the bounds that the export itself had to keep, one sentence each; none: passed.
    public func faults(for manifest: Manifest) -> [String] {
        var faults: [String] = []
        let gate = manifest.parity
        for (name, found, bound) in [
            ("mean KL", parity.meanKL, gate.gateMeanKL), ("KL at the worst position", parity.worstKL, gate.gateWorstKL),
        ] where !(found <= bound) {  // so that NaN fails
            faults.append("\(name) is \(brief(found)) nats, at most \(brief(bound)) was expected")
        }
        if !(parity.decidedTop1Agreement >= gate.gateDecidedTop1Agreement) {
            faults.append(
                "top-1 agreement where the reference is decided is \(brief(parity.decidedTop1Agreement)), "
                    + "at least \(brief(gate.gateDecidedTop1Agreement)) was expected")
        }
        for (name, agreement) in [("greedy tokens", greedy), ("chats", chats)] {
            if let compared = agreement.compared, let agreeing = agreement.agreeing, agreeing < compared {
                faults.append("\(agreeing) of \(compared) \(name) agree, all were expected")
            }
        }
        return faults
    }

    private func brief(_ value: Double) -> String { String(format: "%.3g", value) }
}

// Written out, since what is not measured has to stand there as null.

extension DeviceReport: Codable {
    enum CodingKeys: String, CodingKey {
        case schema, device, parity, greedy, chats, latency
        case manifestSHA256 = "manifest_sha256"
        case peakMemoryBytes = "peak_memory_bytes"
    }

    public init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        let found = try fields.decode(String.self, forKey: .schema)
        guard found == DeviceReport.schema else {
            throw DecodingError.dataCorruptedError(forKey: .schema, in: fields, debugDescription: "it is '\(found)'")
        }
        manifestSHA256 = try fields.decode(String.self, forKey: .manifestSHA256)
        device = try fields.decode(Device.self, forKey: .device)
        parity = try fields.decode(Parity.self, forKey: .parity)
        greedy = try fields.decode(Agreement.self, forKey: .greedy)
        chats = try fields.decode(Agreement.self, forKey: .chats)
        latency = try fields.decode(Latency.self, forKey: .latency)
        peakMemoryBytes = try fields.decodeIfPresent(Int.self, forKey: .peakMemoryBytes)
    }

    public func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try fields.encode(DeviceReport.schema, forKey: .schema)
        try fields.encode(manifestSHA256, forKey: .manifestSHA256)
        try fields.encode(device, forKey: .device)
        try fields.encode(parity, forKey: .parity)
        try fields.encode(greedy, forKey: .greedy)
        try fields.encode(chats, forKey: .chats)
        try fields.encode(latency, forKey: .latency)
        try fields.encode(peakMemoryBytes, forKey: .peakMemoryBytes)
    }
}

extension Agreement: Codable {
    enum CodingKeys: String, CodingKey {
        case prompts, compared, agreeing, reason
    }

    public func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try fields.encodeIfPresent(prompts, forKey: .prompts)
        try fields.encode(compared, forKey: .compared)
        try fields.encode(agreeing, forKey: .agreeing)
        try fields.encodeIfPresent(reason, forKey: .reason)
    }
}

extension Latency: Codable {
    enum CodingKeys: String, CodingKey {
        case threads, runs
        case loadSeconds = "load_s"
        case timeToFirstTokenMilliseconds = "time_to_first_token_ms"
        case prefillTokensPerSecond = "prefill_tokens_per_s"
        case decodeTokensPerSecond = "decode_tokens_per_s"
        case promptTokens = "prompt_tokens"
        case decodedTokens = "decoded_tokens"
    }

    public func encode(to encoder: any Encoder) throws {
        var fields = encoder.container(keyedBy: CodingKeys.self)
        try fields.encode(loadSeconds, forKey: .loadSeconds)
        try fields.encode(timeToFirstTokenMilliseconds, forKey: .timeToFirstTokenMilliseconds)
        try fields.encode(prefillTokensPerSecond, forKey: .prefillTokensPerSecond)
        try fields.encode(decodeTokensPerSecond, forKey: .decodeTokensPerSecond)
        try fields.encode(promptTokens, forKey: .promptTokens)
        try fields.encode(decodedTokens, forKey: .decodedTokens)
        try fields.encode(threads, forKey: .threads)
        try fields.encode(runs, forKey: .runs)
    }
}
