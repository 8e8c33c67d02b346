package ai.onnxruntime;

public abstract class TensorInfo implements ValueInfo {
  public final OnnxJavaType type = OnnxJavaType.FLOAT;
}
