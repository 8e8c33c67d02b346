/// The self-test with its runner at the other end of a pipe, so that an artifact can be driven by these very sources
/// where its runtime has no Swift.
///
///     SelfTestOverPipe BUNDLE REPORT RUNTIME
///
/// One line of JSON for each request on standard output, one for its answer on standard input:
///
///     {"rewind": 96}        {}
///     {"feed": [1, 2, 3]}   {"logits": "float32, little-endian, in base64"}
///
/// or {"error": "a sentence"}, which ends it. Exit codes: 0 written, 2 usage, 3 anything else, told on standard error.
import Foundation
import LlamaBundle

#if canImport(Darwin)
import Darwin
#else
import Glibc
#endif

struct PipeRunner: Runner {
    private struct Answer: Decodable {
        let logits: Data?
        let error: String?
    }

    mutating func rewind(to position: Int) throws { _ = try ask(["rewind": position]) }

    mutating func feed(_ ids: [Int]) throws -> [Float] {
        guard let bytes = try ask(["feed": ids]).logits, !bytes.isEmpty, bytes.count.isMultiple(of: 4) else {
            throw BundleError("the pipe answered a feed without logits", hint: "answer with float32 in base64")
        }
        return bytes.withUnsafeBytes { memory in
            (0..<bytes.count / 4).map { index in
                let bits = memory.loadUnaligned(fromByteOffset: 4 * index, as: UInt32.self)
                return Float(bitPattern: UInt32(littleEndian: bits))
            }
        }
    }

    private func ask(_ request: some Encodable) throws -> Answer {
        FileHandle.standardOutput.write(try JSONEncoder().encode(request) + Data("\n".utf8))
        guard let line = readLine() else {
            throw BundleError("the pipe was closed before the test was done", hint: "see why its other end stopped")
        }
        let answer = try JSONDecoder().decode(Answer.self, from: Data(line.utf8))
        if let error = answer.error { throw BundleError(error, hint: "look at the other end of the pipe") }
        return answer
    }
}

func complain(_ text: String) { FileHandle.standardError.write(Data((text + "\n").utf8)) }

guard CommandLine.arguments.count == 4 else {
    complain("usage: SelfTestOverPipe BUNDLE REPORT RUNTIME")
    exit(2)
}
let words = CommandLine.arguments
do {
    let bundle = try ModelBundle(folder: URL(fileURLWithPath: words[1]))
    var tokenizer: (any Tokenizer)?
    do {
        tokenizer = try ByteLevelTokenizer(bundle: bundle)
    } catch {
        complain("Chats are compared as text alone: \(error)")
    }
    var runner: any Runner = PipeRunner()
    let report = try SelfTest(bundle, tokenizer: tokenizer).run(
        &runner, device: .current(runtime: words[3], app: "SelfTestOverPipe"), progress: complain)
    try report.write(to: URL(fileURLWithPath: words[2]))
    report.faults(for: bundle.manifest).forEach(complain)
} catch {
    complain("\(error)")
    exit(3)
}
