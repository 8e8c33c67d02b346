package ai.onnxruntime;

import java.util.Map;
import java.util.Set;

public abstract class OrtSession implements AutoCloseable {
  public native Result run(
      Map<String, ? extends OnnxTensorLike> inputs,
      Set<String> requestedOutputs,
      Map<String, ? extends OnnxValue> pinnedOutputs,
      RunOptions runOptions)
      throws OrtException;

  public native Map<String, NodeInfo> getInputInfo() throws OrtException;

  @Override
  public native void close() throws OrtException;

  public static class RunOptions {}

  public static class SessionOptions implements AutoCloseable {
    public native void setIntraOpNumThreads(int count) throws OrtException;

    @Override
    public native void close();
  }

  public abstract static class Result implements AutoCloseable {
    public native OnnxValue get(int index);

    @Override
    public native void close();
  }
}
