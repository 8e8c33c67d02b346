package ai.onnxruntime;

import java.nio.FloatBuffer;
import java.nio.LongBuffer;

public abstract class OnnxTensor extends OnnxTensorLike {
  public static native OnnxTensor createTensor(OrtEnvironment environment, FloatBuffer data, long[] shape)
      throws OrtException;

  public static native OnnxTensor createTensor(OrtEnvironment environment, LongBuffer data, long[] shape)
      throws OrtException;

  public native FloatBuffer getFloatBuffer();
}
