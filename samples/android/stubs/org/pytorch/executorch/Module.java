package org.pytorch.executorch;

/** What the app uses of executorch-android, so that its calls can be compiled without it. */
public class Module {
  public static final int LOAD_MODE_MMAP = 1;

  public static native Module load(String modelPath, int loadMode, int numThreads);

  public native EValue[] forward(EValue... inputs);

  public native void destroy();
}
