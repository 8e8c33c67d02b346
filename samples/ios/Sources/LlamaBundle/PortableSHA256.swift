/// SHA-256 as FIPS 180-4 defines it, for systems without CryptoKit.
struct PortableSHA256 {
    private var state: [UInt32] = [
        0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
    ]
    private var pending: [UInt8] = []
    private var length: UInt64 = 0
    private var words = [UInt32](repeating: 0, count: 64)

    mutating func add(_ bytes: UnsafeRawBufferPointer) {
        length += UInt64(bytes.count)
        var rest = bytes[...]
        if !pending.isEmpty {
            let taken = rest.prefix(64 - pending.count)
            pending += taken
            rest = rest.dropFirst(taken.count)
            guard pending.count == 64 else { return }
            let block = pending
            block.withUnsafeBytes { compress($0) }
            pending = []
        }
        while rest.count >= 64 {
            compress(UnsafeRawBufferPointer(rebasing: rest.prefix(64)))
            rest = rest.dropFirst(64)
        }
        pending += rest
    }

    /// The 32 bytes for all that was added so far.
    func finished() -> [UInt8] {
        var copy = self
        let zeros = (119 - pending.count) % 64
        let padding = [0x80] + [UInt8](repeating: 0, count: zeros) + Self.bigEndian(length &* 8)
        padding.withUnsafeBytes { copy.add($0) }
        return copy.state.flatMap { Self.bigEndian($0) }
    }

    private static func bigEndian(_ value: some FixedWidthInteger) -> [UInt8] {
        withUnsafeBytes(of: value.bigEndian) { Array($0) }
    }

    private mutating func compress(_ block: UnsafeRawBufferPointer) {
        let constants = Self.constants
        words.withUnsafeMutableBufferPointer { w in
            for i in 0..<16 {
                w[i] = UInt32(bigEndian: block.loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self))
            }
            for i in 16..<64 {
                let (early, late) = (w[i - 15], w[i - 2])
                let first = rotate(early, 7) ^ rotate(early, 18) ^ (early >> 3)
                let second = rotate(late, 17) ^ rotate(late, 19) ^ (late >> 10)
                w[i] = w[i - 16] &+ first &+ w[i - 7] &+ second
            }
        }
        var (a, b, c, d) = (state[0], state[1], state[2], state[3])
        var (e, f, g, h) = (state[4], state[5], state[6], state[7])
        for i in 0..<64 {
            let choice = (e & f) ^ (~e & g)
            let sum = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)
            let first = h &+ sum &+ choice &+ constants[i] &+ words[i]
            let majority = (a & b) ^ (a & c) ^ (b & c)
            let second = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) &+ majority
            (h, g, f, e) = (g, f, e, d &+ first)
            (d, c, b, a) = (c, b, a, first &+ second)
        }
        for (i, value) in [a, b, c, d, e, f, g, h].enumerated() { state[i] = state[i] &+ value }
    }

    /// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
    private static let constants: [UInt32] = {
        let primes = (2...311).filter { n in !(2..<n).contains { n % $0 == 0 } }
        return primes.map(fractionOfCubeRoot)
    }()

    /// floor(2^32 frac(cbrt n)): the largest x with x^3 <= n 2^96, of which the lowest 32 bits are kept.
    private static func fractionOfCubeRoot(_ n: Int) -> UInt32 {
        var root: UInt64 = 0  // below 7 * 2^32
        for bit in (0..<35).reversed() {
            let tried = root | (1 << UInt64(bit))
            if cube(tried, isAtMost: UInt64(n)) { root = tried }
        }
        return UInt32(truncatingIfNeeded: root)
    }

    /// Whether x^3 <= n 2^96, for x below 2^35: x^2 has 70 bits and x^3 105, in two words each.
    private static func cube(_ x: UInt64, isAtMost n: UInt64) -> Bool {
        let square = x.multipliedFullWidth(by: x)
        let low = square.low.multipliedFullWidth(by: x)
        let high = square.high * x + low.high
        let bound = n << 32  // n 2^96 = bound 2^64
        return high < bound || (high == bound && low.low == 0)
    }
}

private func rotate(_ value: UInt32, _ count: UInt32) -> UInt32 { (value >> count) | (value << (32 - count)) }
