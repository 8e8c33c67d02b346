package ai.onnxruntime;

public enum OnnxJavaType {
  FLOAT,
  INT8;

  public final int size = 0;
}
