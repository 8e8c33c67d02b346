package ai.onnxruntime;

public abstract class OrtEnvironment implements AutoCloseable {
  public static native OrtEnvironment getEnvironment();

  public native OrtSession createSession(String modelPath, OrtSession.SessionOptions options) throws OrtException;
}
