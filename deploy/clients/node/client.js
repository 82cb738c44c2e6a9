// Sandpiper from Node with amqplib.
//
//     npm ci
//     node client.js amqp://guest:guest@127.0.0.1:5672/%2f ../jobs.ndjson
//
// Copy `advice` and the class. `main` shows them at work.

import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import amqp from 'amqplib'

const ADVICE = {
  succeeded: 'use', // stdout, artifacts
  // The program did it and would do it again: tell whoever wrote it, with `error`, stdout and stderr.
  failed: 'tell',
  signaled: 'tell',
  timeout: 'tell',
  cpu_limit: 'tell',
  memory_limit: 'tell',
  output_limit: 'tell',
  syscall_killed: 'tell',
  // Never run. `error` names the field: it is the publisher that has to change.
  rejected: 'fix',
  // You asked for it; or it came too late to be of use.
  cancelled: 'drop',
  expired: 'drop',
  // The worker's fault, not the job's: again, after a pause.
  worker_error: 'retry',
}

// A status of a later version is told, not tried again: that could go on for ever.
const advice = (result) => ADVICE[result.status] ?? 'tell'

class Sandpiper {
  waiting = new Map()
  seen = new Set()
  duplicates = 0

  static async connect(url, { direct = false } = {}) {
    const self = new Sandpiper()
    self.connection = await amqp.connect(url)
    self.channel = await self.connection.createConfirmChannel()
    self.replyTo = direct
      ? 'amq.rabbitmq.reply-to' // no queue at all: quickest, and what comes when we are gone is lost
      : (await self.channel.assertQueue('', { exclusive: true })).queue // else it is in sandpiper.results
    // A job that no queue took comes back, before its confirm.
    self.channel.on('return', ({ fields, properties }) => {
      self.waiting.get(properties.correlationId)?.reject(new Error(`${fields.replyText}: ${fields.routingKey}`))
    })
    self.connection.on('error', (error) => self.waiting.forEach(({ reject }) => reject(error)))
    await self.channel.consume(self.replyTo, (message) => self.#take(message), { noAck: true })
    return self
  }

  /** A promise of the result. One that is given up does not stop the job: cancel does. */
  async submit(job, onOutput) {
    job = { id: randomUUID(), stream: onOutput !== undefined, ...job }
    const result = new Promise((resolve, reject) => {
      this.waiting.set(job.id, { resolve, reject, onOutput, shown: 0 })
    })
    result.catch(() => {}) // the caller sees it, when it waits
    await this.#publish('', 'sandpiper.jobs', job, {
      replyTo: this.replyTo,
      correlationId: job.id,
      messageId: job.id,
      timestamp: Math.floor(Date.now() / 1000),
      persistent: true,
    })
    return { id: job.id, result }
  }

  /** Tries again where that helps, under a new id: results under one id are duplicates. */
  async run(job, { onOutput, attempts = 2, timeoutMs = 60_000 } = {}) {
    let result
    for (let attempt = 0; attempt < attempts; attempt++) {
      if (attempt > 0) {
        await sleep((500 + Math.random() * 500) * 2 ** attempt)
        job = { ...job, id: `${result.id}.${attempt}` }
      }
      const submitted = await this.submit(job, onOutput)
      const late = sleep(timeoutMs, null, { ref: false }).then(() => {
        throw new Error(`no result of ${submitted.id} within ${timeoutMs} ms`)
      })
      result = await Promise.race([submitted.result, late])
      if (advice(result) !== 'retry') break
    }
    return result
  }

  cancel(id) {
    return this.#publish('sandpiper.control', '', { cancel: id })
  }

  close() {
    return this.connection.close()
  }

  /** Resolves when the broker keeps the message. */
  #publish(exchange, key, message, properties = {}) {
    const body = Buffer.from(JSON.stringify(message))
    const options = { contentType: 'application/json', mandatory: true, ...properties }
    return new Promise((resolve, reject) => {
      this.channel.publish(exchange, key, body, options, (error) => (error ? reject(error) : resolve()))
    })
  }

  #take(message) {
    const { messageId, correlationId, type } = message.properties
    if (this.seen.has(messageId)) {
      this.duplicates++ // delivery is at least once
      return
    }
    this.seen.add(messageId)
    if (this.seen.size > 10_000) this.seen.delete(this.seen.values().next().value)
    const waits = this.waiting.get(correlationId)
    if (!waits) return
    const body = JSON.parse(message.content)
    if (type === 'output') {
      // A job that had to start again sends its output from 0 again: what was shown is not shown twice.
      if (body.seq === waits.shown) {
        waits.shown++
        waits.onOutput?.(body)
      }
    } else {
      this.waiting.delete(correlationId)
      waits.resolve(body)
    }
  }
}

function show(name, result) {
  console.log(`${name}: ${result.status}, ${advice(result)}: ${result.error ?? result.stdout.trim()}`)
}

async function main(url, file) {
  const sandpiper = await Sandpiper.connect(url)

  console.log('== every status')
  const jobs = readFileSync(file, 'utf8').trim().split('\n').map((line) => JSON.parse(line))
  const results = await Promise.all(jobs.map((job) => sandpiper.run(job)))
  jobs.forEach((job, n) => show(job.id, results[n]))

  console.log('== output while it runs')
  const count = "import time\nfor n in range(3):\n    print('step', n)\n    time.sleep(0.3)"
  const onOutput = (piece) => process.stdout.write(piece.data)
  show('counts', await sandpiper.run({ code: count }, { onOutput }))

  console.log('== cancelled while it runs')
  const long = "import time\nprint('started')\ntime.sleep(60)"
  show('sleeps', await sandpiper.run({ code: long }, { onOutput: (piece) => sandpiper.cancel(piece.id) }))

  console.log('== files in, files out, metadata')
  const { artifacts, metadata } = await sandpiper.run({
    code: "import os\nos.mkdir('out')\nopen('out/upper.txt', 'w').write(open('in.txt').read().upper())",
    files: [{ path: 'in.txt', content: 'hello' }],
    artifacts: ['out/*.txt'],
    metadata: { customer: 'c-17' },
  })
  for (const file of artifacts) {
    console.log(file.path, Buffer.from(file.base64, 'base64').toString(), metadata.customer)
  }

  console.log('== published twice, handled once')
  const job = { id: randomUUID(), code: "print('once')" }
  const first = await sandpiper.submit(job)
  const second = await sandpiper.submit(job)
  show('twice', await Promise.race([first.result, second.result]))
  while (sandpiper.duplicates === 0) await sleep(50)
  console.log('duplicates dropped:', sandpiper.duplicates)

  console.log('== direct reply-to')
  const direct = await Sandpiper.connect(url, { direct: true })
  show('direct', await direct.run({ code: 'print(6 * 7)' }))
  await direct.close()
  await sandpiper.close()
}

if (process.argv.length !== 4) {
  console.error('usage: node client.js AMQP_URL JOBS.ndjson')
  process.exit(2)
}
await main(process.argv[2], process.argv[3])
