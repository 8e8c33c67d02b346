import XCTest

@testable import LlamaBundle

final class UTF8StreamTests: XCTestCase {
    func testACharacterSplitOverTokensComesOutWhole() {
        var stream = UTF8Stream()
        let bytes = Array("a🙂é".utf8)
        let pieces = bytes.map { stream.append([$0]) }
        XCTAssertEqual(pieces, ["a", "", "", "", "🙂", "", "é"])
        XCTAssertEqual(stream.finish(), "")
    }

    func testWhatWasCutOffComesOutAsAReplacementCharacter() {
        var stream = UTF8Stream()
        XCTAssertEqual(stream.append(Array("x🙂".utf8.prefix(3))), "x")
        XCTAssertEqual(stream.finish(), "\u{FFFD}")
        XCTAssertEqual(stream.finish(), "")
    }

    func testBytesThatAreNoTextDoNotHoldBackWhatFollows() {
        var stream = UTF8Stream()
        XCTAssertEqual(stream.append([0xFF]), "\u{FFFD}")
        XCTAssertEqual(stream.append([0x80, 0x41]), "\u{FFFD}A")
        XCTAssertEqual(stream.append([0xF0, 0x9F]), "")
        XCTAssertEqual(stream.append([0x41]), "\u{FFFD}A")
        XCTAssertEqual(stream.append([0xC0]), "\u{FFFD}")  // begins no character at all: nothing to wait for
    }

    func testTokensComeOutAsTheWholeTextWouldAtEverySplit() {
        let text = "naïve, 東京 🙂\n"
        let bytes = Array(text.utf8)
        for cut in 0...bytes.count {
            var stream = UTF8Stream()
            let joined = stream.append(bytes[..<cut]) + stream.append(bytes[cut...]) + stream.finish()
            XCTAssertEqual(joined, text)
        }
    }
}
