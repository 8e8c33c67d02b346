import XCTest

@testable import LlamaBundle

final class BundleTests: XCTestCase {
    func testAWholeBundleOpens() throws {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        let bundle = try ModelBundle(folder: folder)
        XCTAssertEqual(bundle.manifest.model.endTokens, [3])
        XCTAssertNil(bundle.manifest.model.beginToken)
        XCTAssertEqual(bundle.artifact.lastPathComponent, "model.onnx")
        XCTAssertEqual(try bundle.sampling(), .greedy)
    }

    func testAFlippedByteNamesTheFileAndBothHashes() throws {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        let url = folder.appendingPathComponent("model.onnx")
        var data = try Data(contentsOf: url)
        let wanted = Digest.of(data)
        data[3] ^= 1
        try data.write(to: url)
        let said = message { try ModelBundle(folder: folder) }
        XCTAssertTrue(
            said.contains("model.onnx has SHA-256 \(Digest.of(data)), its manifest says \(wanted)"), said)
        XCTAssertTrue(said.contains("export the bundle again"), said)
        XCTAssertNoThrow(try ModelBundle(folder: folder, check: .sizes))
    }

    func testAFileThatIsShortOrAwayIsNamed() throws {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        try TinyBundle.text("the art", to: folder, "model.onnx")
        let short = message { try ModelBundle(folder: folder, check: .sizes) }
        XCTAssertTrue(short.contains("model.onnx has 7 bytes, its manifest says 12"), short)
        try FileManager.default.removeItem(at: folder.appendingPathComponent("model.onnx"))
        let away = message { try ModelBundle(folder: folder) }
        XCTAssertTrue(away.contains("lacks model.onnx"), away)
    }

    func testAManifestOfAnotherSchemaSaysBoth() throws {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        try TinyBundle.writeManifest(in: folder, schema: "llama-export/bundle/9")
        let said = message { try ModelBundle(folder: folder) }
        XCTAssertTrue(said.contains("'llama-export/bundle/9', 'llama-export/bundle/1' was expected"), said)
        try TinyBundle.text(#"{"schema": "llama-export/bundle/1", "target": "coreml"}"#, to: folder, "manifest.json")
        let lacking = message { try ModelBundle(folder: folder) }
        XCTAssertTrue(lacking.contains("is missing"), lacking)
        let nothing = message { try ModelBundle(folder: folder.appendingPathComponent("none")) }
        XCTAssertTrue(nothing.contains("has no manifest.json"), nothing)
    }

    func testAPathOutsideTheBundleIsRefused() throws {
        let folder = try scratch()
        try TinyBundle.write(to: folder)
        let url = folder.appendingPathComponent("manifest.json")
        let manifest = try String(contentsOf: url, encoding: .utf8)
        try TinyBundle.text(
            manifest.replacingOccurrences(of: "\"model.onnx\"", with: "\"../model.onnx\""), to: folder, "manifest.json")
        let said = message { try ModelBundle(folder: folder) }
        XCTAssertTrue(said.contains("lists ../model.onnx"), said)
    }

    func testARealBundleOpensAndAnswersItsChats() throws {
        let bundle = try realBundle()
        XCTAssertNoThrow(try ModelBundle(folder: bundle.folder))
        let chats = try SelfTest(bundle, tokenizer: ByteLevelTokenizer(bundle: bundle)).chats()
        XCTAssertEqual(chats.agreeing, chats.compared)
        XCTAssertGreaterThan(try XCTUnwrap(chats.compared), 0)
    }
}

final class DigestTests: XCTestCase {
    private func portable(_ data: Data, pieces: [Int] = []) -> String {
        var hash = PortableSHA256()
        var rest = data[...]
        for count in pieces + [data.count] {
            Data(rest.prefix(count)).withUnsafeBytes { hash.add($0) }
            rest = rest.dropFirst(count)
        }
        return Digest.text(hash.finished())
    }

    /// The examples of FIPS 180-4, and the empty message.
    func testVectors() {
        let vectors = [
            "": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq":
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ]
        for (text, digest) in vectors { XCTAssertEqual(portable(Data(text.utf8)), digest) }
        XCTAssertEqual(
            portable(Data(repeating: 0x61, count: 1_000_000), pieces: [1, 63, 64, 65, 5000]),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
    }

    func testEveryLengthAroundABlockIsTheSameInPieces() {
        for length in 50...130 {
            let data = Data((0..<length).map { UInt8($0) })
            XCTAssertEqual(portable(data), portable(data, pieces: [7, 0, 50]))
            XCTAssertEqual(portable(data), Digest.of(data))
        }
    }

    func testAFileIsReadInPieces() throws {
        let url = try scratch().appendingPathComponent("file")
        let data = Data((0..<(1 << 20) + 3).map { UInt8(truncatingIfNeeded: $0) })
        try data.write(to: url)
        XCTAssertEqual(try Digest.of(contentsOf: url), Digest.of(data))
    }
}
