// Makes JSON schemas of the types that Grafana publishes for its dashboards (@grafana/schema, and the data source's
// query from @grafana/grafana-foundation-sdk): one document on standard output, by name. Nothing unknown is allowed.
import { createGenerator } from 'ts-json-schema-generator';

const modules = process.argv[2];
const grafana = `${modules}/@grafana/schema/dist/types/raw`;
const sdk = `${modules}/@grafana/grafana-foundation-sdk/dist`;
const wanted = {
  dashboard: [`${grafana}/dashboard/x/types.gen.d.ts`, 'Dashboard'],
  'stat.options': [`${grafana}/composable/stat/panelcfg/x/types.gen.d.ts`, 'Options'],
  'timeseries.options': [`${grafana}/composable/timeseries/panelcfg/x/types.gen.d.ts`, 'Options'],
  'timeseries.custom': [`${grafana}/composable/timeseries/panelcfg/x/types.gen.d.ts`, 'FieldConfig'],
  'table.options': [`${grafana}/composable/table/panelcfg/x/types.gen.d.ts`, 'Options'],
  query: [`${sdk}/prometheus/types.gen.d.ts`, 'Dataquery'],
};
const schemas = {};
for (const [name, [path, type]] of Object.entries(wanted)) {
  schemas[name] = createGenerator({ path, type, skipTypeCheck: true, additionalProperties: false, encodeRefs: false }).createSchema(type);
}
process.stdout.write(JSON.stringify(schemas));
