package ai.onnxruntime;

public abstract class NodeInfo {
  public native ValueInfo getInfo();
}
