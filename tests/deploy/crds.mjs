// Custom resources against their operators' schemas: values by the packages' own validators, and field names by
// the type checker, since the validators let unknown ones pass and the compiler does not.
//
//     node crds.mjs FILE KIND...    run as a copy in the directory where package.json is installed
import fs from 'node:fs';
import path from 'node:path';
import yaml from 'js-yaml';
import ts from 'typescript';

const [file, ...wanted] = process.argv.slice(2);

const MODULES = {
  ScaledObject: '@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject',
  TriggerAuthentication: '@kubernetes-models/keda/keda.sh/v1alpha1/TriggerAuthentication',
  PodMonitor: '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor',
};

let source = '';
const found = new Set();
for (const resource of yaml.loadAll(fs.readFileSync(file, 'utf8'))) {
  const module = MODULES[resource?.kind];
  if (!module) continue;
  const { [resource.kind]: Model } = await import(module);
  try {
    new Model(resource).validate();
  } catch (error) {
    fail(`${resource.kind} ${resource.metadata.name}: ${error.message}`);
  }
  found.add(resource.kind);
  source += `import { I${resource.kind} } from '${module}';\n`;
  source += `export const n${found.size}: I${resource.kind} = ${JSON.stringify(resource, null, 1)};\n`;
}
for (const kind of wanted) if (!found.has(kind)) fail(`no schema for ${kind}`);

if (source) {
  const name = path.join(path.dirname(process.argv[1]), 'resources.ts');
  fs.writeFileSync(name, source);
  const program = ts.createProgram([name], { noEmit: true, strict: true, skipLibCheck: true, types: [],
    module: ts.ModuleKind.NodeNext, moduleResolution: ts.ModuleResolutionKind.NodeNext, target: ts.ScriptTarget.ES2022 });
  const errors = ts.getPreEmitDiagnostics(program);
  if (errors.length) fail(errors.map((one) => ts.flattenDiagnosticMessageText(one.messageText, '\n')).join('\n'));
}

function fail(sentence) {
  console.error(sentence);
  process.exit(1);
}
