package ai.onnxruntime;

import java.nio.ByteBuffer;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;

public abstract class OnnxTensor extends OnnxTensorLike {
  public static native OnnxTensor createTensor(
      OrtEnvironment environment, ByteBuffer data, long[] shape, OnnxJavaType type) throws OrtException;

  public static native OnnxTensor createTensor(OrtEnvironment environment, LongBuffer data, long[] shape)
      throws OrtException;

  public native FloatBuffer getFloatBuffer();
}
