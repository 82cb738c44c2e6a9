// Reads an AsyncAPI document on standard input with AsyncAPI's own parser, which validates it against the
// specification and its bindings. What the parser says goes to standard output; an error is a failure.

import { readFileSync } from 'node:fs'
import { DiagnosticSeverity, Parser } from '@asyncapi/parser'

const { document, diagnostics } = await new Parser().parse(readFileSync(0, 'utf8'))
for (const { severity, path, message } of diagnostics) {
  console.log(`${DiagnosticSeverity[severity] ?? severity} ${path.join('.')}: ${message}`)
}
if (document === undefined || diagnostics.some(({ severity }) => severity <= 1)) process.exit(1)
const operations = document.operations().all().map((operation) => `${operation.action()} ${operation.id()}`)
console.log(`valid: ${operations.join(', ')}`)
