import Foundation
import XCTest

@testable import LlamaBundle

/// The bundle that the tests are given in LLAMA_BUNDLE; without one they are skipped.
func realBundle() throws -> ModelBundle {
    guard let path = ProcessInfo.processInfo.environment["LLAMA_BUNDLE"], !path.isEmpty else {
        throw XCTSkip("LLAMA_BUNDLE names no bundle")
    }
    return try ModelBundle(folder: URL(fileURLWithPath: path), check: .sizes)
}

extension XCTestCase {
    /// An empty folder that is gone after the test.
    func scratch() throws -> URL {
        let url = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
        addTeardownBlock { try? FileManager.default.removeItem(at: url) }
        return url
    }

    func message(of body: () throws -> some Any, line: UInt = #line) -> String {
        var found = ""
        XCTAssertThrowsError(try body(), line: line) { found = ($0 as? BundleError)?.description ?? "\($0)" }
        return found
    }
}

/// Writes a safetensors file of int32, int64 and float32 tensors.
func writeSafetensors(_ tensors: [(name: String, dtype: String, shape: [Int], bytes: Data)], to url: URL) throws {
    var (header, body): ([String: Any], Data) = (["__metadata__": ["format": "pt"]], Data())
    for tensor in tensors {
        let offsets = [body.count, body.count + tensor.bytes.count]
        header[tensor.name] = ["dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets] as [String: Any]
        body += tensor.bytes
    }
    let written = try JSONSerialization.data(withJSONObject: header)
    try (bytes([UInt64(written.count)]) + written + body).write(to: url)
}

func bytes<T>(_ numbers: [T]) -> Data { numbers.withUnsafeBytes { Data($0) } }

/// A bundle in small: a vocabulary of 4, a context of 16, a drive of 2 + 2 + 2 tokens, one prompt, two chats.
///
/// What the model says is made up: after token t the likeliest is t + 1, by how much depends on the position.
struct TinyBundle {
    static let vocabulary = 4
    static let ids = [0, 1, 2, 3, 0, 1]
    static let positions = [1, 3, 4, 5]

    static func logits(after token: Int, at position: Int) -> [Float] {
        (0..<vocabulary).map { $0 == (token + 1) % vocabulary ? 3 + Float(position) / 4 : Float($0) / 8 }
    }

    static func write(to folder: URL) throws {
        let rows = positions.map { logits(after: ids[$0], at: $0) }
        let order = rows.map { row in row.indices.sorted { row[$0] > row[$1] }.prefix(3) }
        let sums = rows.map { row in Float(log(row.reduce(0) { $0 + exp(Double($1)) })) }
        let kept = zip(order, rows).flatMap { ids, row in ids.map { row[$0] } }
        try writeSafetensors(
            [
                ("ids", "I64", [ids.count], bytes(ids.map(Int64.init))),
                ("positions", "I32", [positions.count], bytes(positions.map(Int32.init))),
                ("top_ids", "I32", [positions.count, 3], bytes(order.flatMap { $0.map(Int32.init) })),
                ("top_logits", "F32", [positions.count, 3], bytes(kept)),
                ("logsumexp", "F32", [positions.count], bytes(sums)),
            ], to: folder.appendingPathComponent("goldens.safetensors"))
        try text(goldens, to: folder, "goldens.json")
        try text(chatFormat, to: folder, "chat_format.json")
        try text("the artifact", to: folder, "model.onnx")
        try writeManifest(in: folder)
    }

    static func writeManifest(in folder: URL, schema: String = "llama-export/bundle/1") throws {
        let names = try FileManager.default.contentsOfDirectory(atPath: folder.path).filter { $0 != "manifest.json" }
        let files = try names.sorted().map { name -> String in
            let data = try Data(contentsOf: folder.appendingPathComponent(name))
            return #"{"path": "\#(name)", "bytes": \#(data.count), "sha256": "\#(Digest.of(data))"}"#
        }
        try text(
            """
            {"schema": "\(schema)", "target": "onnxruntime", "context": 16, "logits": "last",
             "model": {"vocab_size": 4, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 2,
                       "bos_token_id": null, "eos_token_ids": [3]},
             "parity": {"gate_mean_kl_nats": 0.001, "gate_worst_kl_nats": 0.01, "gate_decided_top1_agreement": 0},
             "files": [\(files.joined(separator: ", "))]}
            """, to: folder, "manifest.json")
    }

    static func text(_ text: String, to folder: URL, _ name: String) throws {
        try Data(text.utf8).write(to: folder.appendingPathComponent(name))
    }

    static let chatFormat = """
        {"trims": true, "user": ["<b>U:", "\\n"], "system_user": ["<b>S:", "\\nU:", "\\n"], "assistant": ["A:", "\\n"],
         "next_user": ["U:", "\\n"], "answer": "A:"}
        """

    /// The third token of the answer is unclear: two are compared.
    static let goldens = """
        {"prefills": [2, 2], "floor_kl_nats": 0.0001, "weight_sha256": {},
         "prompts": [{"text": "0", "ids": [0], "greedy_ids": [1, 2, 3], "greedy_text": "123",
                      "greedy_margins": [3.0, 2.5, 0.1]}],
         "chats": [{"messages": [{"role": "user", "content": " hi "}], "text": "<b>U:hi\\nA:", "ids": [1]},
                   {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
                    "text": "<b>S:s\\nU:hi\\nA:", "ids": [2]}]}
        """
}

/// A runner that keeps its cache as the list of tokens fed, and says what a function of it says.
struct FakeRunner: Runner {
    final class Log {
        var calls: [String] = []
    }

    var cached: [Int] = []
    let log = Log()
    var says: ([Int]) -> [Float] = { TinyBundle.logits(after: $0.last!, at: $0.count - 1) }

    mutating func rewind(to position: Int) throws {
        try checkRewind(position, current: cached.count)
        log.calls.append("rewind \(position)")
        cached.removeSubrange(position...)
    }

    mutating func feed(_ ids: [Int]) throws -> [Float] {
        log.calls.append("feed \(ids)")
        cached += ids
        return says(cached)
    }
}
