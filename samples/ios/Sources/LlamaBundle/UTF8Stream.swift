/// Bytes of tokens to text: what a token begins and the next one ends comes out whole.
public struct UTF8Stream {
    private var held: [UInt8] = []

    public init() {}

    /// The text that is complete with these bytes. Bytes that are no UTF-8 come out as U+FFFD.
    public mutating func append(_ bytes: some Sequence<UInt8>) -> String {
        held += bytes
        let complete = held.count - Self.unfinished(held)
        defer { held.removeFirst(complete) }
        return String(decoding: held[..<complete], as: UTF8.self)
    }

    /// What was still waiting for its end, as U+FFFD; nothing where nothing was.
    public mutating func finish() -> String {
        defer { held = [] }
        return String(decoding: held, as: UTF8.self)
    }

    /// How many bytes at the end begin a character that more bytes could complete.
    private static func unfinished(_ bytes: [UInt8]) -> Int {
        for back in 1..<4 where back <= bytes.count {
            let byte = bytes[bytes.count - back]
            if byte & 0b1100_0000 == 0b1000_0000 { continue }  // inside a character
            return length(startingWith: byte) > back ? back : 0
        }
        return 0
    }

    private static func length(startingWith byte: UInt8) -> Int {
        switch byte {
        case 0xC2...0xDF: 2
        case 0xE0...0xEF: 3
        case 0xF0...0xF4: 4
        default: 1
        }
    }
}
