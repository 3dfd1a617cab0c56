// node-redis.js -- redis of npm, see work.js.
//
// Two faults of the library itself (5.12.1), which any move of slots brings out, are told by a
// line "fault" and are no error here:
//
//   - cluster.multi() asks the node that its map of the slots names, once: _executeMulti() is not
//     called by way of _execute(), which follows MOVED. The error reaches the application; nothing
//     was executed. Any other command with the key loads the map anew; then it is tried again.
//   - A sharded channel that moves is lost: the client then says 'sharded-channel-moved', while the
//     cluster listens for 'server-sunsubscribe' (client/index.js, cluster/cluster-slots.js), so nobody
//     subscribes anew; and the server's word that it moved, when it comes while another SSUBSCRIBE
//     is under way, is taken for the answer to that (client/commands-queue.js). An application cannot
//     see it, and nothing is made good: `silentShards`.
//
// SPDX-License-Identifier: AGPL-3.0-only
'use strict';

const redis = require('redis');
const work = require('./work.js');

async function main() {
    const cluster = redis.createCluster({
        rootNodes: work.nodes().map(({ host, port }) => ({ url: `redis://${host}:${port}` })),
        scripts: {
            twice: redis.defineScript({
                NUMBER_OF_KEYS: 2,
                SCRIPT: work.script,
                parseCommand(parser, counter, log) {
                    parser.pushKey(counter);
                    parser.pushKey(log);
                },
                transformReply: (reply) => reply,
            }),
        },
    });
    cluster.on('error', work.failed);
    await cluster.connect();
    await work.run('redis', require('redis/package.json').version, {
        set: (key, value) => cluster.set(key, value),
        get: (key) => cluster.get(key),
        // Commands of the same turn of the event loop go out together: that is its pipeline.
        pipeline: (key, items) => Promise.all(items.map((item) => cluster.rPush(key, item))),
        async transaction(a, b) {
            for (let tries = 0; ; tries++) {
                try {
                    return await cluster.multi().incr(a).incr(b).exec();
                } catch (error) {
                    if (tries === 5 || !error.message.startsWith('MOVED ')) throw error;
                    work.fault('MULTI follows no MOVED');
                    await cluster.get(a);
                }
            }
        },
        script: (counter, log) => cluster.twice(counter, log),
        publish: (channel, message) => cluster.publish(channel, message),
        spublish: (channel, message) => cluster.sPublish(channel, message),
        subscribe: (channel, handler) => cluster.subscribe(channel, handler),
        ssubscribe: (channel, handler) => cluster.sSubscribe(channel, handler),
        silentShards: 'a sharded channel that moves is lost',
        close: () => cluster.destroy(),
    });
}

main();
