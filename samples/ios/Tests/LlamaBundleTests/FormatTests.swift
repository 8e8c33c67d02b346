import XCTest

@testable import LlamaBundle

final class ChatFormatTests: XCTestCase {
    private func format(_ json: String = TinyBundle.chatFormat) throws -> ChatFormat {
        try JSONDecoder().decode(ChatFormat.self, from: Data(json.utf8))
    }

    func testTurnsStandBetweenTheirTexts() throws {
        let messages = [
            Message(.user, "one"), Message(.assistant, " two "), Message(.user, "\tthree\n"), Message(.assistant, ""),
            Message(.user, "four"),
        ]
        XCTAssertEqual(try format().render(messages), "<b>U:one\nA:two\nU:three\nA:\nU:four\nA:")
    }

    func testMessagesAreLeftAloneWhereTheTemplateDoes() throws {
        let json = TinyBundle.chatFormat.replacingOccurrences(of: "true", with: "false")
        XCTAssertEqual(try format(json).render([Message(.user, " a\r\n")]), "<b>U: a\r\n\nA:")
    }

    func testWhiteSpaceIsWhatATemplateTakesForIt() throws {
        let text = "\u{1F}\u{A0}\r\n\u{3000}a\u{200B}\u{2029}"
        XCTAssertTrue(sameBytes(try format().render([Message(.user, text)]), "<b>U:a\u{200B}\nA:"))
    }

    func testOtherOrdersAreRefusedByName() throws {
        for messages in [[], [Message(.assistant, "a")], [Message(.system, "s")]] {
            XCTAssertTrue(message { try format().render(messages) }.contains("the user last"))
        }
        let said = message { try format().render([Message(.user, "a"), Message(.user, "b")]) }
        XCTAssertTrue(said.contains("the roles of the messages are user, user"), said)
    }

    func testASystemMessageIsRefusedWhereNoneIsTaken() throws {
        let json = TinyBundle.chatFormat.replacingOccurrences(
            of: #"["<b>S:", "\nU:", "\n"]"#, with: "null")
        let format = try format(json)
        XCTAssertFalse(format.takesSystemMessage)
        let said = message { try format.render([Message(.system, "s"), Message(.user, "u")]) }
        XCTAssertTrue(said.contains("takes no system message"), said)
    }

    func testAFormatWithTooFewTextsIsNone() {
        let json = TinyBundle.chatFormat.replacingOccurrences(of: #"["A:", "\n"]"#, with: #"["A:"]"#)
        XCTAssertThrowsError(try format(json))
    }
}

final class SafetensorsTests: XCTestCase {
    func testNumbersComeBackAsWritten() throws {
        let url = try scratch().appendingPathComponent("t.safetensors")
        try writeSafetensors(
            [
                ("odd", "I8", [1], Data([7])),  // what follows is not aligned
                ("long", "I64", [2], bytes([Int64(-1), 1 << 40])),
                ("short", "I32", [2, 1], bytes([Int32(5), -6])),
                ("real", "F32", [3], bytes([0.5, -Float.infinity, 1e-30])),
                ("none", "F32", [0, 4], Data()),
            ], to: url)
        let tensors = try Safetensors(contentsOf: url)
        XCTAssertEqual(tensors.names, ["long", "none", "odd", "real", "short"])
        XCTAssertEqual(try tensors.integers("long"), [-1, 1 << 40])
        XCTAssertEqual(try tensors.integers("short"), [5, -6])
        XCTAssertEqual(try tensors.shape("short"), [2, 1])
        XCTAssertEqual(try tensors.floats("real"), [0.5, -Float.infinity, 1e-30])
        XCTAssertEqual(try tensors.floats("none"), [])
        XCTAssertTrue(message { try tensors.floats("long") }.contains("long as I64, F32 was expected"))
        XCTAssertTrue(message { try tensors.integers("other") }.contains("no tensor other, only long, none"))
    }

    func testAFileThatIsNoneSaysWhy() throws {
        let url = try scratch().appendingPathComponent("t.safetensors")
        func says(_ data: Data, line: UInt = #line) throws -> String {
            try data.write(to: url)
            return message(of: { try Safetensors(contentsOf: url).floats("a") }, line: line)
        }
        func file(_ header: String, _ body: Data = Data()) -> Data {
            bytes([UInt64(header.utf8.count)]) + Data(header.utf8) + body
        }
        XCTAssertTrue(try says(Data([1, 2])).contains("has 2 bytes"))
        XCTAssertTrue(try says(bytes([UInt64.max])).contains("its header alone"))
        XCTAssertTrue(try says(file("{")).contains("header that is not"))
        let short = #"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#
        XCTAssertTrue(try says(file(short, Data(count: 4))).contains("with 4 bytes of tensors"))
        let mismatched = #"{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}"#
        XCTAssertTrue(try says(file(mismatched, Data(count: 8))).contains("shape [9]"))
        let huge = #"{"a": {"dtype": "F32", "shape": [4611686018427387904, 16], "data_offsets": [0, 0]}}"#
        XCTAssertTrue(try says(file(huge)).contains("shape"))
    }
}

final class TokenizerTests: XCTestCase {
    func testItGivesTheIDsOfTheGoldensAndTheirTextBack() throws {
        let bundle = try realBundle()
        let tokenizer = try ByteLevelTokenizer(bundle: bundle)
        let goldens = try bundle.goldens()
        for chat in goldens.chats { XCTAssertEqual(try tokenizer.encode(chat.text), chat.ids) }
        for prompt in goldens.prompts {
            var text = UTF8Stream()
            let answer = prompt.greedyIDs.map { text.append(tokenizer.bytes(of: $0)) }.joined() + text.finish()
            XCTAssertEqual(answer, prompt.greedyText)
        }
        XCTAssertEqual(try tokenizer.encode(""), [])
    }

    func testATokenizerOfAnotherKindIsRefusedWithAWayOut() throws {
        let url = try scratch().appendingPathComponent("tokenizer.json")
        let json = #"{"model": {"type": "BPE", "byte_fallback": true, "vocab": {"a": 0}, "merges": []}}"#
        try Data(json.utf8).write(to: url)
        let said = message { try ByteLevelTokenizer(contentsOf: url) }
        XCTAssertTrue(said.contains("swift-transformers"), said)
    }
}
