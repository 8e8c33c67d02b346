import Foundation

/// What an app needs of `manifest.json`.
public struct Manifest: Decodable, Sendable {
    public struct Model: Decodable, Sendable {
        public let name: String?
        public let vocabularySize: Int
        public let layers: Int
        public let keyValueHeads: Int
        public let headDimension: Int
        public let beginToken: Int?
        /// Each of them ends an answer.
        public let endTokens: [Int]

        enum CodingKeys: String, CodingKey {
            case name
            case vocabularySize = "vocab_size"
            case layers = "num_hidden_layers"
            case keyValueHeads = "num_key_value_heads"
            case headDimension = "head_dim"
            case beginToken = "bos_token_id"
            case endTokens = "eos_token_ids"
        }
    }

    public struct File: Decodable, Sendable {
        public let path: String
        public let bytes: Int
        public let sha256: String
    }

    /// What the export itself had to keep.
    public struct Parity: Decodable, Sendable {
        public let gateMeanKL: Double
        public let gateWorstKL: Double
        public let gateDecidedTop1Agreement: Double

        enum CodingKeys: String, CodingKey {
            case gateMeanKL = "gate_mean_kl_nats"
            case gateWorstKL = "gate_worst_kl_nats"
            case gateDecidedTop1Agreement = "gate_decided_top1_agreement"
        }
    }

    /// Artifacts by the toolchain that made them.
    public enum Target: String, Decodable, Sendable {
        case executorch, onnxruntime, coreml
    }

    /// Of which positions of one call the artifact gives logits.
    public enum Logits: String, Decodable, Sendable {
        case last, all
    }

    public let schema: String
    public let model: Model
    public let target: Target
    /// Positions that the key-value cache holds.
    public let context: Int
    public let logits: Logits
    public let files: [File]
    public let parity: Parity

    static let schema = "llama-export/bundle/1"

    private struct Schema: Decodable { let schema: String }

    /// Throws `BundleError` for what is no manifest of ours.
    static func decode(_ data: Data, from url: URL) throws -> Manifest {
        let decoder = JSONDecoder()
        do {
            let found = try decoder.decode(Schema.self, from: data).schema
            guard found == schema else {
                throw BundleError(
                    "\(url.path) has schema '\(found)', '\(schema)' was expected",
                    hint: "export the bundle with the version of llama-export that this app was made for")
            }
            let manifest = try decoder.decode(Manifest.self, from: data)
            try manifest.check(url)
            return manifest
        } catch let error as DecodingError {
            throw BundleError("\(url.path) is not as an export writes it: \(error.sentence)", hint: copyAgain)
        }
    }

    private func check(_ url: URL) throws {
        for file in files where file.path.hasPrefix("/") || file.path.split(separator: "/").contains("..") {
            throw BundleError("\(url.path) lists \(file.path), a path inside the bundle was expected", hint: copyAgain)
        }
        guard context > 0, model.vocabularySize > 0 else {
            throw BundleError(
                "\(url.path) has a context of \(context) and a vocabulary of \(model.vocabularySize), "
                    + "more than 0 was expected",
                hint: copyAgain)
        }
    }
}

extension DecodingError {
    /// What is wrong and where, without the types of Swift.
    var sentence: String {
        switch self {
        case .keyNotFound(let key, let context): "\(Self.path(context.codingPath + [key])) is missing"
        case .valueNotFound(_, let context): "\(Self.path(context.codingPath)) is null"
        case .typeMismatch(let type, let context): "\(Self.path(context.codingPath)) is no \(type)"
        case .dataCorrupted(let context):
            context.codingPath.isEmpty
                ? "it is no JSON" : "\(Self.path(context.codingPath)): \(context.debugDescription)"
        @unknown default: "\(self)"
        }
    }

    private static func path(_ keys: [any CodingKey]) -> String {
        keys.map { $0.intValue.map(String.init) ?? $0.stringValue }.joined(separator: ".")
    }
}

/// A JSON file of the bundle. Throws `BundleError` where it is missing or broken.
func decode<T: Decodable>(_: T.Type, from url: URL) throws -> T {
    do {
        return try JSONDecoder().decode(T.self, from: try read(url))
    } catch let error as DecodingError {
        throw BundleError("\(url.path) is not as an export writes it: \(error.sentence)", hint: copyAgain)
    }
}

func read(_ url: URL) throws -> Data {
    do {
        return try Data(contentsOf: url, options: .mappedIfSafe)
    } catch {
        throw BundleError("\(url.path) cannot be read: \(error.localizedDescription)", hint: copyAgain)
    }
}
