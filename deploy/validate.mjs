// Checks what Kubernetes itself has no schema of (KEDA's and the Prometheus operator's resources), read as JSON from
// stdin: node deploy/validate.mjs FOLDER, where FOLDER has node_modules.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const models = `${pathToFileURL(process.argv[2])}/node_modules/@kubernetes-models`;
const FILES = {
  ScaledObject: "keda/keda.sh/v1alpha1/ScaledObject.js",
  ServiceMonitor: "prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor.js",
  PrometheusRule: "prometheus-operator/monitoring.coreos.com/v1/PrometheusRule.js",
};

for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  const { [resource.kind]: Kind } = await import(`${models}/${FILES[resource.kind]}`);
  new Kind(resource).validate();
  console.log(resource.kind);
}
