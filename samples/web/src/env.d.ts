/** The version in package.json, put in by the build. */
declare const __VERSION__: string;

interface Window {
  /** The last self-test's report, for whoever drives the page. */
  deviceReport?: import("./selftest").DeviceReport;
}
