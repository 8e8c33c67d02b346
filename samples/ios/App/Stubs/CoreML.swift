// What CoreMLRunner.swift calls, declared after Apple's documentation, so that check-app.sh can check types without
// Apple's SDK. No part of the app.
import Foundation

public enum MLComputeUnits: Int { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }
public enum MLMultiArrayDataType: Int { case double, float32, float16, int32 }

public class MLModelConfiguration {
    public init() {}
    public var computeUnits = MLComputeUnits.all
}

public class MLState {}

public class MLModel {
    public class func compileModel(at: URL) async throws -> URL { fatalError() }
    public class func load(contentsOf: URL, configuration: MLModelConfiguration) async throws -> MLModel {
        fatalError()
    }
    public func makeState() -> MLState { fatalError() }
    public func prediction(from: any MLFeatureProvider, using: MLState) throws -> any MLFeatureProvider { fatalError() }
}

public protocol MLFeatureProvider {
    func featureValue(for: String) -> MLFeatureValue?
}

public class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws {}
    public func featureValue(for: String) -> MLFeatureValue? { fatalError() }
}

public class MLFeatureValue {
    public init(multiArray: MLMultiArray) {}
    public var multiArrayValue: MLMultiArray? { fatalError() }
}

public protocol MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}
extension Float: MLShapedArrayScalar {}
extension Float16: MLShapedArrayScalar {}

public struct MLShapedArray<Scalar: MLShapedArrayScalar> {
    public init(scalars: some Sequence<Scalar>, shape: [Int]) {}
    public init(_: MLMultiArray) {}
    public var scalars: [Scalar] { fatalError() }
}

public class MLMultiArray {
    public init(_: MLShapedArray<some MLShapedArrayScalar>) {}
    public var dataType: MLMultiArrayDataType { fatalError() }
}

/// Objective-C's, which Linux lacks.
public func autoreleasepool<T>(invoking body: () throws -> T) rethrows -> T { try body() }
