// work.js -- the work of tests/clients/run in JavaScript, for any client library.
//
//   program host:port,host:port,... KIND:TAG...
//
// One worker for each KIND:TAG, which stands for a key of its own and its slot:
// values, pipelines, transactions, scripts, messages. What it prints:
//
//   library NAME VERSION
//   without TEXT             what the library does not have
//   ready                    the workers begin
//   turn                     a worker has done as much as TURN again
//   fault TEXT               a fault of the library itself was met
//   error KIND TAG TEXT      what a call threw, or an answer that cannot be
//   acknowledged KIND TAG N  at the end: how many writes were
//   silent KIND TAG          at the end: a channel on which nothing is heard any more
//   done
//
// It ends when its standard input does.
//
// SPDX-License-Identifier: AGPL-3.0-only
'use strict';

const TURN = 20;
const AT_ONCE = 5;          // commands in a pipeline
const PAUSE_MS = 2;
const HEARD_MS = 10000;     // at the end, for a message to arrive

exports.script = "local n = redis.call('incr', KEYS[1]) redis.call('rpush', KEYS[2], n) return n";
exports.sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
exports.nodes = () => process.argv[2].split(',').map((address) => {
    const [host, port] = address.split(':');
    return { host, port: Number(port) };
});

const say = (...words) => process.stdout.write(words.join(' ') + '\n');
let stopped = false;

function expect(got, wanted) {
    if (JSON.stringify(got) !== JSON.stringify(wanted))
        throw new Error('answered ' + JSON.stringify(got) + ' instead of ' + JSON.stringify(wanted));
}

// Each does one thing, n having been acknowledged: how many are then.
const steps = {
    async values(client, tag, n) {
        expect(await client.set(`{${tag}}value`, String(n + 1)), 'OK');
        expect(await client.get(`{${tag}}value`), String(n + 1));
        return n + 1;
    },
    async pipelines(client, tag, n) {
        const items = Array.from({ length: AT_ONCE }, (_, i) => n + i + 1);
        expect(await client.pipeline(`{${tag}}list`, items.map(String)), items);
        return n + AT_ONCE;
    },
    async transactions(client, tag, n) {
        expect(await client.transaction(`{${tag}}a`, `{${tag}}b`), [n + 1, n + 1]);
        return n + 1;
    },
    async scripts(client, tag, n) {
        expect(await client.script(`{${tag}}counter`, `{${tag}}log`), n + 1);
        return n + 1;
    },
};

async function worker(client, kind, tag) {
    let n = 0;
    for (let i = 1; !stopped; i++) {
        try {
            n = await steps[kind](client, tag, n);
        } catch (error) {
            say('error', kind, tag, error);
            return;         // what the server has now is not known
        }
        if (i % TURN === 0) say('turn');
        await exports.sleep(PAUSE_MS);
    }
    say('acknowledged', kind, tag, n);
}

// A channel of the whole cluster and one of the slot's shard. A message that was sent while the library
// subscribes anew is lost, as the protocol has it; but a channel must not stay silent.
async function messenger(client, tag) {
    const heard = { channels: -1, shards: -1 }, names = { channels: `{${tag}}all`, shards: `{${tag}}shard` };
    const listen = { channels: 'subscribe', shards: 'ssubscribe' }, send = { channels: 'publish', shards: 'spublish' };
    for (const kind in names)
        await client[listen[kind]](names[kind], (message) => { heard[kind] = Math.max(heard[kind], Number(message)); });
    return async () => {
        let n = 0;
        const publish = async () => {
            n++;
            for (const kind in names) {
                try {
                    await client[send[kind]](names[kind], String(n));
                } catch (error) {
                    say('error', kind, tag, error);
                    return false;
                }
            }
            return true;
        };
        for (let i = 1; !stopped; i++) {
            if (!await publish()) return;
            if (i % TURN === 0) say('turn');
            await exports.sleep(PAUSE_MS);
        }
        const last = n + 1, until = Date.now() + HEARD_MS;
        do {
            if (!await publish()) return;
            await exports.sleep(10);
        } while ((heard.channels < last || (heard.shards < last && !client.silentShards)) && Date.now() < until);
        for (const kind in names) {
            if (heard[kind] >= last) say('acknowledged', kind, tag, n);
            else if (kind === 'shards' && client.silentShards) exports.fault(client.silentShards);
            else say('silent', kind, tag);
        }
    };
}

// With `silentShards` the library is known to lose sharded channels: why.
//
// `client` has set, get, pipeline, transaction, script, publish, subscribe, spublish, ssubscribe, close.
exports.run = async (name, version, client) => {
    process.on('unhandledRejection', (error) => say('error', 'any', '-', error));
    say('library', name, version);
    const workers = [];
    for (const work of process.argv.slice(3)) {
        const [kind, tag] = work.split(':');
        workers.push(kind === 'messages' ? await messenger(client, tag) : () => worker(client, kind, tag));
    }
    process.stdin.resume();
    process.stdin.on('end', () => { stopped = true; });
    say('ready');
    await Promise.all(workers.map((work) => work()));
    say('done');
    client.close();
    process.exit(0);
};
exports.fault = (text) => say('fault', text);
exports.failed = (error) => say('error', 'any', '-', error);
