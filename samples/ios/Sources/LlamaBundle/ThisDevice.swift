import Foundation

extension DeviceReport.Device {
    /// The device that this runs on, with the runtime and the app named by the caller.
    public static func current(runtime: String, app: String) -> DeviceReport.Device {
        #if os(iOS)
        let system = "iOS"
        #elseif os(macOS)
        let system = "macOS"
        #else
        let system = "Linux"
        #endif
        let version = ProcessInfo.processInfo.operatingSystemVersion
        let number = "\(version.majorVersion).\(version.minorVersion).\(version.patchVersion)"
        return DeviceReport.Device(model: machine(), os: "\(system) \(number)", runtime: runtime, app: app)
    }

    /// As the kernel calls it: `iPhone17,1`, `arm64`, `x86_64`.
    private static func machine() -> String {
        var names = utsname()
        guard uname(&names) == 0 else { return "unknown" }
        return withUnsafeBytes(of: &names.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }
}

/// The most memory that this process has held, in bytes.
public func peakMemoryBytes() -> Int? {
    var usage = rusage()
    #if canImport(Darwin)
    guard getrusage(RUSAGE_SELF, &usage) == 0 else { return nil }
    return usage.ru_maxrss
    #else
    guard getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage) == 0 else { return nil }
    return usage.ru_maxrss * 1024
    #endif
}
