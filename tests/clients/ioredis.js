// ioredis.js -- see work.js.
//
// SPDX-License-Identifier: AGPL-3.0-only
'use strict';

const Redis = require('ioredis');
const work = require('./work.js');

// Pipelines and transactions give an array of [error, answer].
function answers(results) {
    return results.map(([error, answer]) => {
        if (error) throw error;
        return answer;
    });
}

async function main() {
    const cluster = new Redis.Cluster(work.nodes(), { shardedSubscribers: true });
    const handlers = new Map();
    const handle = (channel, message) => handlers.get(channel)(message);
    cluster.on('message', handle);
    cluster.on('smessage', handle);
    cluster.on('error', work.failed);
    cluster.defineCommand('twice', { numberOfKeys: 2, lua: work.script });
    await new Promise((resolve) => cluster.once('ready', resolve));
    await work.run('ioredis', require('ioredis/package.json').version, {
        set: (key, value) => cluster.set(key, value),
        get: (key) => cluster.get(key),
        async pipeline(key, items) {
            const pipeline = cluster.pipeline();
            items.forEach((item) => pipeline.rpush(key, item));
            return answers(await pipeline.exec());
        },
        async transaction(a, b) {
            return answers(await cluster.multi().incr(a).incr(b).exec());
        },
        script: (counter, log) => cluster.twice(counter, log),
        publish: (channel, message) => cluster.publish(channel, message),
        spublish: (channel, message) => cluster.spublish(channel, message),
        subscribe(channel, handler) {
            handlers.set(channel, handler);
            return cluster.subscribe(channel);
        },
        ssubscribe(channel, handler) {
            handlers.set(channel, handler);
            return cluster.ssubscribe(channel);
        },
        close: () => cluster.disconnect(),
    });
}

main();
