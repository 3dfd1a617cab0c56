# Each failure that was seen in another server's slot migration, with the number
# it has in our list of them, and the test that a server with it does not pass:
# here, or in another unit. A failure that needs what this version refuses (the
# AOF) has the test of the refusal.

source tests/support/slot_migration.tcl

# number unit test
set ::elsewhere {
    1  damage     "A command of the stream that fails at the target fails the job, with command and slot named"
    1  damage     "A key that did not arrive is found before the hand-off, with the slot and both counts named"
    1  damage     "A target that answers such errors with panic by configuration survives"
    2  rivals-replicas "PEERS 2: replicas that min-replicas-to-write misses at the target cost no key, at its replica neither"
    3  commands   "A target that cannot save its data is refused"
    4  crash      "The target hangs while prepared: no write is lost, whoever decides"
    5  data       "Functions of the target are not touched by a move"
    5  data       "LFU counters and idle times move with the keys"
    6  rivals-replicas "PEERS 6: the source keeps its copy until the target's replica, which stands still, has taken over, too"
    6  rivals-replicas "PEERS 6, 26: the target dies when it has taken over, what its replica $what: no key is lost"
    8  rivals-replicas "PEERS 8, 24: a job cancelled while it is $step, with both replicas standing still, ends at once and leaves nothing there"
    9  rivals-replicas "PEERS 9, 16, 22: FLUSHALL at both ends and CLIENT PAUSE in mid-job: replicas end with what their masters have"
    9  handoff    "CLIENT PAUSE at either node does not break a hand-off"
    12 visibility "The target shows its own keys and no others, $state"
    12 visibility "An import is not in MONITOR, notifications, statistics or the slow log of the target"
    15 handoff    "A job opposite to one that runs runs at the same time"
    16 handoff    "CLIENT PAUSE at either node does not break a hand-off"
    17 commands   "Leftover keys at the target are refused with the slot, and nothing happens to them"
    17 commands   "Slots in a SETSLOT state are refused, at both nodes, with the remedy"
    18 failure    "A failure at $point leaves both nodes as they were and says why"
    18 failure    "The snapshot's child is killed: the job fails and says so, nothing stays"
    19 commands   "A target that cannot save its data is refused"
    20 rivals-replicas "PEERS 20: what expires, and what is evicted, in mid-job goes at the target's replica as well"
    20 commands   "A target without room for the slots is refused, with the numbers"
    20 visibility "The target's expiry and eviction leave imported keys alone, and the source's word counts"
    21 stream     "COPY with its database named more than once stays within the slots that move"
    23 aof        "The append-only file is turned off and on in the middle, on either side"
    24 failure    "A job past its commit cannot be cancelled, and completes"
    36 data       "Empty slots, the first and the last slot move"
    37 handoff    "A client that comes to the target a moment early is held until it is decided"
    7  hangs      "PEERS 7: a source that hangs in the handshake, and a target, end the job within repl-timeout, with the reason"
    8  fence      "PEERS 8: a job cancelled at its source while $phase stays cancelled, and is in nobody's way"
    9  fence      "PEERS 9, 16: CLIENT PAUSE, FLUSHALL and CLUSTER FAILOVER of a node with two jobs end neither"
    13 topology   "PEERS 13: adjacent ranges move as one job or as several, overlapping requests are refused by the slot"
    15 topology   "$what at the same time: nobody is refused, nobody stalls, no write is lost"
    24 fence      {PEERS 24: CANCEL at the [expr {$node ? "target" : "source"}] of a job that is $phase: both ends say the same, and it is so}
    25 fence      "PEERS 25: the cluster bus is lost at the hand-off, the two agree without it, and no write is lost"
    25 hangs      "A $end that hangs for longer than the node timeout ($how) while a job is $phase: no acknowledged write is lost"
    26 rivals-replicas "PEERS 26: the target's replica stands still from $step on: the job is not done and says why; when it is, the target may die"
    26 rivals-replicas "PEERS 26: a replica of the target that copies everything anew in the middle has what its master had, and follows"
    30 rivals-replicas "PEERS 30: a target's promoted replica lets 400000 keys that stay the source's go without standing still"
    31 rivals-replicas "PEERS 31: CLUSTER FAILOVER of the $side while a job is $step$with: one shard has the slots, no write is lost"
    31 rivals-replicas "PEERS 31: the source's replica stands still: no write waits for it, and the hand-off says for whom it does"
    32 fence      "PEERS 32: with the last word lost, no moment has two nodes that serve a slot"
    33 damage     "A command of the stream that fails at the target fails the job, with command and slot named"
    34 membership {PEERS 34: a [expr {$forgotten ? "target" : "source"}] that $who forgets while a job is $phase: every slot has one owner, with its keys}
    35 fence      "PEERS 35: writers that cannot be made to wait end in attempts that are given up, not in a fence that stays"
    36 rivals-replicas "PEERS 36: slot 0 and slot 16383 move between shards with replicas, and only they"
    36 topology   "PEERS 36: slot 0 and slot 16383 move alone, with their neighbours and together, and only they"
    37 fence      "PEERS 37: who waits at the target is sent back at once when the attempt is $how, and served by the source"
}
# Those for which there must be a test, here or there.
set ::numbers {1 2 3 4 5 6 7 8 9 10 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 30 31 32 33 34 35 36 37}

proc unit_text {unit} {
    set fd [open tests/unit/cluster/slot-migration/$unit.tcl]
    set text [read $fd]
    close $fd
    return $text
}

# Start node n again with these lines added to its configuration; without lines,
# with what it had before.
proc restart_with {n lines} {
    set file [srv -$n config_file]
    if {![info exists ::config_of($n)]} {
        set fd [open $file]
        set ::config_of($n) [read $fd]
        close $fd
    }
    set fd [open $file w]
    puts $fd $::config_of($n)
    puts $fd $lines
    close $fd
    kill_node $n
    start_node_again $n
    wait_cluster_agrees
}

# Load from upstream's benchmark, without end: SETs of `size` bytes to keys of
# the slot, 64 in a pipeline. A handle for stop_load.
proc start_load {n slot size keys clients} {
    set pid [exec src/redis-benchmark -p [node_port $n] -c $clients -P 64 -n 1000000000 -r $keys {*}[tls_options] \
        set [key_in $slot load:__rand_int__] [string repeat x $size] >/dev/null 2>/dev/null &]
    lappend ::loads $pid
    return $pid
}

proc tls_options {} {
    if {!$::tls} {return {}}
    list --tls --cert tests/tls/client.crt --key tests/tls/client.key --cacert tests/tls/ca.crt
}

# Processor time of the thread that runs the commands.
proc main_thread_us {n} {
    set sum 0
    foreach field {used_cpu_sys_main_thread used_cpu_user_main_thread} {
        set sum [expr {$sum+[getInfoProperty [R $n info cpu] $field]}]
    }
    expr {round($sum*1e6)}
}

proc stop_load {pid} {
    set at [lsearch $::loads $pid]
    if {$at == -1} return
    catch {exec kill -9 $pid}
    set ::loads [lreplace $::loads $at $at]
}

# Run the body; what it started and did not stop, because it failed, must not go on.
proc with_load {body} {
    set ::loads {}
    set failed [catch {uplevel 1 $body} error options]
    foreach pid $::loads {stop_load $pid}
    if {!$failed} return
    foreach name {writers moving others} {
        upvar $name handle
        if {[info exists handle]} {foreach writer $handle {close [open [lindex $writer 1].stop w]}}
    }
    failpoints_off 0
    failpoints_off 2
    foreach n {0 2} {R $n config set cluster-slot-migration-buffer-limit 1gb}
    return -options $options $error
}

proc calls {n command} {
    expr {[regexp {calls=(\d+)} [cmdrstat $command [Rn $n]] -> calls] ? $calls : 0}
}

# The most that has waited at either end so far, and how often that was looked at.
proc look_at_buffers {} {
    foreach {n field} {0 mem_cluster_slot_migration_output 2 mem_cluster_slot_migration_queues} {
        set bytes [getInfoProperty [R $n info memory] $field]
        if {![string is integer -strict $bytes]} {fail "INFO memory of node $n has no $field"}
        set ::waited($n) [expr {max($::waited($n),$bytes)}]
    }
    incr ::looked
}

proc reset_looks {} {
    set ::waited(0) 0
    set ::waited(2) 0
    set ::looked 0
}

# Wait for the end of these jobs, as closely as one can.
proc end_jobs {from to ids} {
    foreach id $ids {
        foreach n [list $from $to] {
            while {![job_ended [job_field $n $id state]]} {}
        }
    }
}

proc median {values} {
    lindex [lsort -real $values] [expr {[llength $values]/2}]
}

start_cluster 3 0 {tags {external:skip cluster}} {
    test "Every failure of the list has a test" {
        set here [unit_text rivals]
        set found {}
        foreach {number unit title} $::elsewhere {
            if {[string first "test \"$title\"" [unit_text $unit]] < 0} {fail "$unit has no test \"$title\""}
            lappend found $number
        }
        foreach {- numbers} [regexp -all -inline {test "PEERS ([0-9, ]+):} $here] {lappend found {*}[split $numbers ", "]}
        foreach number $::numbers {if {$number ni $found} {fail "failure $number has no test"}}
    }

    test "PEERS 1: commands renamed or disabled at the target cost no key" {
        fresh
        set names {set hset rpush sadd zadd xadd restore del unlink pexpireat hpexpireat multi exec select}
        set lines {}
        foreach name $names {append lines "rename-command $name \"\"\n"}
        restart_with 2 $lines
        foreach slot {5 6} {fill_all_types 0 $slot}
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 6]
        wait_job_state 0 $id streaming
        R 0 multi
        R 0 set [key_in 5 late] x px 100000000
        R 0 hset [key_in 5 late:hash] f v g w
        R 0 hpexpire [key_in 5 late:hash] 100000000 fields 1 f
        R 0 exec
        R 0 del [key_in 5 str:int]
        R 0 xadd [key_in 5 stream:empty] 10-10 f v
        set before [slots_dump 0 {5 6}]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_error "ERR unknown command*" {R 2 set [key_in 5 late] x}
        assert_same_dump $before [slots_dump 2 {5 6}]
        assert_equal 0 [R 0 dbsize]
        move_slots 2 0 5 6
        assert_same_dump $before [slots_dump 0 {5 6}]
        restart_with 2 ""
    }

    test "PEERS 1: a target that wants more replicas than it has for a write costs no key" {
        fresh
        R 2 config set min-replicas-to-write 3
        fill_strings 0 {5 6} 1000
        fill_all_types 0 5
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 6]
        wait_job_state 0 $id streaming
        for {set i 0} {$i < 100} {incr i} {R 0 set [key_in 6 late$i] x}
        set before [slots_dump 0 {5 6}]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_error "NOREPLICAS*" {R 2 set [key_in 6 late] x}
        assert_same_dump $before [slots_dump 2 {5 6}]
        R 2 config set min-replicas-to-write 0
    }

    test "PEERS 3, 19: the target's BGSAVE fails while it imports: it fails the job with the reason, or has all keys" {
        fresh
        fill_strings 0 {5 6} 1000
        set before [slots_dump 0 {5 6}]
        R 2 config set save "3600 1"
        R 2 config set stop-writes-on-bgsave-error yes
        failpoint 2 target_before_section pause
        # Later on the node refuses even the PING of a new connection.
        set c [connect 2]
        set id [migrate 0 2 5 6]
        wait_job_state 2 $id loading
        R 2 set [key_in 16000 k] x
        R 2 config set rdb-key-save-delay 10000000
        R 2 bgsave
        wait_for_condition 500 10 {[node_children 2] ne ""} else {fail "no child"}
        exec kill -9 [node_children 2]
        wait_for_condition 500 10 {[status [Rn 2] rdb_last_bgsave_status] eq "err"} else {fail "the save does not fail"}
        assert_error "MISCONF*" {R 2 set [key_in 16000 k] y}
        R 0 set [key_in 5 first] write
        $c debug slotmig failpoint target_before_section off
        $c close
        wait_for_condition 1500 10 {[job_ended [job_field 0 $id state]] && [job_ended [job_field 2 $id state]]} else {fail "no end: [job 0 $id]"}
        # This version binds itself to nothing that it could not save.
        assert_equal {failed failed} [list [job_field 0 $id state] [job_field 2 $id state]]
        assert_match "*does not accept writes*disk*" [job_field 0 $id last-error]
        assert_equal write [R 0 get [key_in 5 first]]
        R 0 del [key_in 5 first]
        assert_same_dump $before [slots_dump 0 {5 6}]
        R 2 config set rdb-key-save-delay 0
        R 2 save
        move_slots 0 2 5 6
        assert_same_dump $before [slots_dump 2 {5 6}]
        R 2 config set save ""
        R 2 config set stop-writes-on-bgsave-error no
    }

    foreach {when point node} {
        "when it is bound" source_before_commit 0
        "before it is bound" target_before_prepared 2
    } {
        test "PEERS 4: the target hangs behind the fence, $when, and what the source acknowledges since is not lost" {
            fresh
            set key [key_in 5 k]
            fill_strings 0 {5 6} 200
            R 0 set $key before
            failpoint $node $point pause
            set id [migrate 0 2 5 6]
            wait_job_state 2 $id [expr {$node ? "preparing" : "prepared"}]
            R 0 config set cluster-slot-migration-write-pause-timeout 300
            stop_node 2
            # It waits for the fence to fall, then the source serves it.
            assert_equal OK [R 0 set $key acknowledged]
            assert_equal 0 [slot_owner 0 5]
            continue_node 2
            # Whatever was on its way: the attempt that the source gave up is not taken.
            assert_error "MOVED 5 *:[node_port 0]" {R 2 get $key}
            assert_equal acknowledged [R 0 get $key]
            R 0 config set cluster-slot-migration-write-pause-timeout 10000
            failpoint $node $point off
            wait_migrated 0 2 $id
            assert_morethan_equal [job_field 0 $id attempt] 2
            assert_equal acknowledged [R 2 get $key]
            # Nobody has keys of the slots besides their owner.
            assert_equal 201 [R 2 dbsize]
            assert_equal 0 [R 0 dbsize]
        }
    }

    test "PEERS 4: a target that hangs for good behind the fence leaves the source all keys and no orphans" {
        fresh
        R 2 save
        fill_strings 0 {5 6} 200
        set before [slots_dump 0 {5 6}]
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 5 6]
        wait_job_state 2 $id prepared
        R 0 config set cluster-slot-migration-timeout 1000
        R 0 config set cluster-slot-migration-write-pause-timeout 300
        kill_node 2
        wait_for_condition 1500 10 {[job_ended [job_field 0 $id state]]} else {fail "no end: [job 0 $id]"}
        failpoint 0 source_before_commit off
        R 0 config set cluster-slot-migration-timeout 600000
        R 0 config set cluster-slot-migration-write-pause-timeout 10000
        assert_equal failed [job_field 0 $id state]
        assert_equal OK [R 0 set [key_in 5 k] acknowledged]
        start_node_again 2
        wait_cluster_agrees
        assert_equal 0 [slot_owner 2 5]
        assert_equal 0 [R 2 dbsize]
        assert_equal acknowledged [R 0 getdel [key_in 5 k]]
        assert_same_dump $before [slots_dump 0 {5 6}]
        assert_equal 200 [R 0 dbsize]
    }

    foreach {what size keys clients} {"16 bytes" 16 10000 20 "100 KB" 100000 60 4} {
        test "PEERS 10, 28: writers of $what without a pause do not keep a job from its end" {
            with_load {
                fresh
                fill_strings 0 {5 6 7} 30000 100
                foreach n {0 2} {R $n config set cluster-slot-migration-buffer-limit 4mb}
                reset_looks
                set writers [start_writers 1 {5 6 4000}]
                set load [start_load 0 5 $size $keys $clients]
                wait_writers_go_on $writers
                set begun [calls 0 set]
                # Slow enough for the writers to fill any buffer meanwhile.
                set id [lindex [R 0 cluster migrate-slots slotsrange 5 7 node [node_id 2] rate 3000000] 0]
                while {![job_ended [job_field 0 $id state]]} {look_at_buffers}
                stop_load $load
                assert_equal done [job_field 0 $id state] [job 0 $id]
                wait_migrated 0 2 $id
                wait_writers_go_on $writers
                set seen [stop_writers $writers]
                assert_equal {} [dict get $seen errors]
                assert_morethan [calls 0 set] $begun
                # The snapshot was taken once, and all that came since was followed.
                assert_equal 0 [job_field 2 $id interruptions]
                assert_equal [job_field 2 $id keys-total] [job_field 2 $id keys-done]
                assert_morethan [job_field 0 $id stream-bytes] [expr {10*$size}]
                # A limit, and what one turn of the event loop puts on top.
                foreach n {0 2} {assert_lessthan_equal $::waited($n) [expr {2*4*1024*1024}] "bytes that waited at node $n"}
                assert_morethan $::looked 2
                if {$::verbose} {puts "waited: $::waited(0) at the source, $::waited(2) at the target, $::looked looks, [job 0 $id]"}
                foreach n {0 2} {R $n config set cluster-slot-migration-buffer-limit 1gb}
            }
        }
    }

    test "PEERS 10, 28: a target that takes nothing slows the writers of the moving slots, not the others, and fails nothing" {
        with_load {
            fresh
            fill_strings 0 {5 6 7} 3000 100
            foreach n {0 2} {R $n config set cluster-slot-migration-buffer-limit 4mb}
            reset_looks
            set moving [start_writers 1 {6}]
            set others [start_writers 1 {4000}]
            set load [start_load 0 5 1000 1000 10]
            failpoint 2 target_before_section pause
            # Before: how many SETs of the load there are to 200 other writes.
            wait_writers_go_on $others
            set sets [calls 0 set]
            wait_writers_go_on $others 200
            set before [expr {[calls 0 set]-$sets}]
            set id [migrate 0 2 5 7]
            wait_for_condition 1000 10 {[look_at_buffers] > 0 && $::waited(0) + $::waited(2) > 1024*1024 && [job_field 0 $id writers-rate-limit] >= 0} else {
                fail "nobody is slowed: [array get ::waited] [job 0 $id]"
            }
            # What flows while they are full.
            wait_writers_go_on $others
            set sets [calls 0 set]
            wait_writers_go_on $others 200
            set during [expr {[calls 0 set]-$sets}]
            for {set i 0} {$i < 20} {incr i} {look_at_buffers}
            assert_equal snapshot [job_field 0 $id state] [job_field 0 $id last-error]
            assert_match "*writers of the slots are slowed*" [job_field 0 $id reason]
            assert_lessthan $during [expr {$before/2}]
            foreach n {0 2} {assert_lessthan_equal $::waited($n) [expr {2*4*1024*1024}] "bytes that waited at node $n"}
            # Once it takes them, all go on and the job ends.
            failpoint 2 target_before_section off
            wait_writers_go_on $moving
            while {![job_ended [job_field 0 $id state]]} {look_at_buffers}
            stop_load $load
            assert_equal done [job_field 0 $id state] [job_field 0 $id last-error]
            wait_migrated 0 2 $id
            foreach handle [list $moving $others] {
                wait_writers_go_on $handle
                assert_equal {} [dict get [stop_writers $handle] errors]
            }
            foreach n {0 2} {assert_lessthan_equal $::waited($n) [expr {2*4*1024*1024}] "bytes that waited at node $n"}
            if {$::verbose} {puts "sets for 200 other writes: $before before, $during during; waited [array get ::waited]"}
            foreach n {0 2} {R $n config set cluster-slot-migration-buffer-limit 1gb}
        }
    }

    test "PEERS 14: transactions, scripts over several slots and functions loaded meanwhile arrive whole" {
        fresh
        fill_strings 0 {5 6 7 8} 400
        failpoint 0 source_before_cut pause
        failpoint 2 target_before_section pause
        set id [migrate 0 2 5 7]
        wait_job_state 0 $id snapshot
        R 0 function load {#!lua name=meanwhile
            redis.register_function('both', function(keys, args)
                redis.call('set', keys[1], args[1]); return redis.call('rpush', keys[2], args[1]) end)}
        foreach state {snapshot streaming} {
            if {$state eq "streaming"} {
                failpoint 2 target_before_section off
                wait_job_state 0 $id streaming
            }
            R 0 multi
            foreach name {a b c} {R 0 set [key_in 6 transaction:$name] $state}
            R 0 exec
            # Slots that move and one that does not in one execution unit.
            R 0 eval {#!lua flags=allow-cross-slot-keys
                for i = 1, #ARGV do redis.call('append', ARGV[i], 'x') redis.call('incr', ARGV[i] .. 'n') end} 0 \
                [key_in 5 script] [key_in 6 script] [key_in 8 script]
            R 0 fcall both 2 [key_in 7 f] [key_in 7 g] $state
            assert_equal $state [job_field 0 $id state]
        }
        set before [slots_dump 0 {5 6 7}]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_same_dump $before [slots_dump 2 {5 6 7}]
        assert_equal xx [R 2 get [key_in 6 script]]
        assert_equal 2 [R 0 get [key_in 8 scriptn]]
        foreach name {a b c} {assert_equal streaming [R 2 get [key_in 6 transaction:$name]]}
        assert_equal {snapshot streaming} [R 2 lrange [key_in 7 g] 0 -1]
        # Functions belong to the node, not to slots.
        assert_error "ERR Function not found*" {R 2 fcall both 2 [key_in 7 f] [key_in 7 g] x}
        R 0 function flush
    }

    test "PEERS 17: leftover keys at the target are refused each time, and it lives on" {
        fresh
        fill_strings 0 {5 6} 100
        set before [slots_dump 0 {5 6}]
        # As a move that was broken off leaves them: the slot still importing, and after it.
        R 2 cluster setslot 5 importing [node_id 0]
        R 2 asking
        R 2 set [key_in 5 leftover] x
        for {set i 0} {$i < 3} {incr i} {
            assert_error "*[node_id 2]*refuses*slot 5 *" {migrate 0 2 4 6}
            assert_equal {0 0} [list [jobs_running 0] [jobs_running 2]]
        }
        R 2 cluster setslot 5 stable
        for {set i 0} {$i < 3} {incr i} {
            assert_error "*[node_id 2]*refuses*slot 5 has 1 leftover keys*" {migrate 0 2 4 6}
            assert_equal {0 0} [list [jobs_running 0] [jobs_running 2]]
        }
        assert_equal [list [key_in 5 leftover]] [R 2 cluster getkeysinslot 5 10]
        # Once they are gone it moves, with the source's keys only.
        R 2 flushall
        move_slots 0 2 4 6
        assert_same_dump $before [slots_dump 2 {5 6}]
    }

    foreach {state point node} {
        loading target_before_section 2
        following source_before_cut 0
        preparing target_before_prepared 2
        prepared source_before_commit 0
    } {
        test "PEERS 17: keys that get into a slot of the target while the job is $state fail it, and both keep theirs" {
            fresh
            fill_strings 0 {5 6} 100
            set before [slots_dump 0 {5 6}]
            failpoint $node $point pause
            set id [migrate 0 2 5 6]
            wait_job_state 2 $id $state
            R 2 debug populate 1 [key_in 5 leftover] 10
            assert_equal 1 [R 2 cluster countkeysinslot 5]
            failpoint $node $point off
            wait_for_condition 1500 10 {[job_ended [job_field 0 $id state]] && [job_ended [job_field 2 $id state]]} else {
                fail "no end: [job 0 $id] [job 2 $id]"
            }
            assert_equal {failed failed} [list [job_field 0 $id state] [job_field 2 $id state]]
            foreach n {0 2} {assert_match "*slot 5 *keys*" [job_field $n $id last-error]}
            wait_cluster_agrees
            assert_equal 0 [slot_owner 2 5]
            assert_equal 1 [R 2 dbsize]
            assert_same_dump $before [slots_dump 0 {5 6}]
            R 2 flushall
            move_slots 0 2 5 6
            assert_same_dump $before [slots_dump 2 {5 6}]
        }
    }

    test "PEERS 18: after failed forks the next migration works" {
        fresh
        fill_strings 0 {5 6} 100
        set before [slots_dump 0 {5 6}]
        R 0 config set cluster-slot-migration-snapshot fork
        failpoint 0 source_before_fork fail
        for {set i 0} {$i < 3} {incr i} {
            set id [migrate 0 2 5 6]
            wait_for_condition 1500 10 {[string match "cannot fork*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
            assert_equal waiting [job_field 0 $id state]
            R 0 cluster cancel-slot-migrations id $id
            wait_for_condition 1500 10 {[job_ended [job_field 0 $id state]] && [job_ended [job_field 2 $id state]]} else {fail "no end: [job 0 $id]"}
        }
        failpoint 0 source_before_fork off
        R 0 config set cluster-slot-migration-snapshot auto
        # Nothing keeps the node from having children.
        R 0 bgsave
        waitForBgsave [Rn 0]
        move_slots 0 2 5 6
        assert_same_dump $before [slots_dump 2 {5 6}]
    }

    foreach command {
        flushall "flushall async" flushdb "eval redis.call('flushall') 0" "multi flushall exec"
    } {
        test "PEERS 22: [string toupper $command] at the source in mid-job does not bring its keys back" {
            foreach {state point node} {
                loading   target_before_section  2
                following source_before_cut      0
                preparing target_before_prepared 2
                prepared  source_before_commit   0
            } {
                # These wait for the end of a fence, like any command that may write anywhere.
                if {$state in {preparing prepared} && [regexp {^(eval|multi)} $command]} continue
                fresh
                fill_strings 0 {5 6 7} 600
                foreach slot {5 6} {fill_all_types 0 $slot}
                R 0 set [key_in 8 stays] x
                failpoint 0 source_before_cut pause
                if {$state eq "loading"} {failpoint $node $point pause}
                set id [migrate 0 2 5 7]
                wait_job_state 0 $id [expr {$state eq "loading" ? "snapshot" : "streaming"}]
                R 0 set [key_in 6 streamed] x
                failpoint $node $point pause
                if {$state ne "following"} {failpoint 0 source_before_cut off}
                wait_job_state 2 $id $state
                switch -glob $command {
                    multi* {R 0 multi; R 0 flushall; R 0 exec}
                    eval*  {R 0 eval "redis.call('flushall')" 0}
                    *      {R 0 {*}$command}
                }
                assert_equal 0 [R 0 dbsize]
                # An attempt that was under way is off, so writes go on.
                R 0 set [key_in 5 after] $state
                R 0 hset [key_in 7 hash] f v
                R 0 hpexpire [key_in 7 hash] 100000000 fields 1 f
                set before [slots_dump 0 {5 6 7}]
                failpoint 0 source_before_cut off
                failpoint $node $point off
                wait_for_condition 1500 10 {[job_ended [job_field 0 $id state]]} else {fail "no end: [job 0 $id]"}
                assert_equal done [job_field 0 $id state] "$state: [job_field 0 $id last-error]"
                wait_migrated 0 2 $id
                assert_same_dump $before [slots_dump 2 {5 6 7}]
                assert_equal 2 [R 2 dbsize]
                assert_equal 0 [R 0 dbsize]
                assert_equal $state [R 2 get [key_in 5 after]]
            }
        }
    }

    test "PEERS 23: 'appendonly yes' that comes at the target in mid-import makes the job begin again, and a restart loses nothing" {
        fresh
        R 2 config set save ""
        fill_strings 0 {5 6} 1000
        R 2 set [key_in 16000 own] x
        set before [slots_dump 0 {5 6}]
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 6]
        wait_job_state 2 $id following
        R 2 config set aof-use-rdb-preamble no
        R 2 config set appendonly yes
        waitForBgrewriteaof [Rn 2]
        assert_equal 1 [R 2 dbsize]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert {[count_log_message -2 "the append-only file was turned on in the middle"] > 0}
        R 2 debug loadaof
        assert_same_dump $before [slots_dump 2 {5 6}]
        assert_equal x [R 2 get [key_in 16000 own]]
        R 2 config set appendonly no
        R 2 config set aof-use-rdb-preamble yes
    }

    test "PEERS 27: the log of 1000 jobs costs the writers nothing" {
        fresh
        foreach n {0 2} {R $n config set cluster-slot-migration-log-max-len 1000}
        # One empty slot to and fro, then several at a time until there are as many.
        lassign {0 2} from to
        set begun [clock milliseconds]
        for {set i 0} {$i < 100} {incr i} {
            end_jobs $from $to [migrate $from $to 3 3]
            lassign [list $to $from] from to
        }
        set ms [expr {([clock milliseconds]-$begun)/100.0}]
        for {} {$i < 1000} {incr i 6} {
            set blocks {}
            for {set slot 3} {$slot < 9} {incr slot} {lappend blocks slotsrange $slot $slot node [node_id $to]}
            end_jobs $from $to [R $from cluster migrate-slots {*}$blocks]
            lassign [list $to $from] from to
        }
        wait_cluster_agrees
        foreach n {0 2} {
            wait_for_condition 500 10 {[llength [R $n cluster slot-migrations]] == 1000} else {fail "the log has [llength [R $n cluster slot-migrations]] jobs"}
            foreach job [R $n cluster slot-migrations] {assert_equal done [dict get $job state] [dict get $job last-error]}
        }

        # The same SETs at a node with 1000 jobs in its log and at one with none, in
        # turn; this one has given a slot away as well, and so has a replication
        # backlog too. A scan of the log for each write more than doubles what it
        # costs. The main thread's own time is compared, for the machine may be busy.
        move_slots 1 2 6001 6001
        R 1 config set cluster-slot-migration-log-max-len 0
        migrate 2 1 6001 6001
        wait_slot_owner 1 6001 1
        wait_for_condition 500 10 {[R 1 cluster slot-migrations] eq ""} else {fail "the log is not empty"}
        assert_equal 1000 [llength [R 0 cluster slot-migrations]]
        if {$::verbose} {puts "note: [expr {[clock milliseconds]-$begun}] ms for all jobs"}
        set ratios {}
        for {set round 0} {$round < 7} {incr round} {
            foreach {n slot} {1 6000 0 100} {
                set before [main_thread_us $n]
                exec src/redis-benchmark -p [node_port $n] -c 10 -P 16 -n 50000 -r 1000 {*}[tls_options] set [key_in $slot __rand_int__] value >/dev/null
                set cost($n) [expr {[main_thread_us $n]-$before}]
            }
            lappend ratios [expr {double($cost(1))/$cost(0)}]
        }
        if {$::verbose} {puts "$ms ms for a job; time for a SET without jobs to time with 1000: $ratios"}
        assert_morethan_equal [median $ratios] 0.7 "rounds: $ratios"
        foreach n {0 1 2} {R $n config set cluster-slot-migration-log-max-len 128}
    }
}
