# The fence, door by door: only writes to the slots that move wait, whichever way they
# come, and whoever comes to the target too early; nothing else does.

source tests/support/slot_migration.tcl

proc client_waits {n rd} {
    regexp {flags=(\S+)} [R $n client list id $::client_of($rd)] -> flags
    string match *b* $flags
}

proc wait_client_waits {n rd} {
    wait_for_condition 1000 10 {[client_waits $n $rd]} else {fail "the client does not wait: [R $n client list]"}
}

proc reply_of {rd} {
    catch {$rd read} reply
    $rd close
    return $reply
}

# Upstream's test module of timers, but what a timer writes is replicated.
proc load_timer_module {n} {
    load_test_module $n timer {{"INCR", "s"} {"INCR", "!s"}}
}

start_cluster 3 0 {tags {external:skip cluster modules}} {
    set moving [key_in 10 k]
    set other [key_in 4000 k]

    test "Scripts behind the fence: those that say that they only read go on, all others of moving or unnamed keys wait" {
        fresh
        R 0 set $moving 1
        R 0 set $other 1
        R 0 function load {#!lua name=lib
            redis.register_function{function_name='reads', callback=function(keys) return redis.call('get', keys[1]) end, flags={'no-writes'}}
            redis.register_function{function_name='anywhere', callback=function(keys, args) return redis.call('incr', args[1]) end, flags={'allow-cross-slot-keys'}}}
        set id [hold_in_phase preparing 0 2 5 20]
        assert_equal 1 [R 0 eval "#!lua flags=no-writes\nreturn redis.call('get', KEYS\[1\])" 1 $moving]
        assert_equal 7 [R 0 eval "#!lua flags=no-writes\nreturn 7" 0]
        assert_equal 7 [R 0 eval_ro "return 7" 0]
        assert_equal 1 [R 0 fcall reads 1 $moving]
        assert_equal 1 [R 0 fcall_ro reads 1 $moving]
        assert_equal 2 [R 0 eval "#!lua flags=allow-cross-slot-keys\nreturn redis.call('incr', KEYS\[1\])" 1 $other]
        set waiting {}
        lappend waiting [send_command 0 eval "#!lua\nreturn redis.call('get', KEYS\[1\])" 1 $moving]
        lappend waiting [send_command 0 eval "#!lua flags=allow-cross-slot-keys\nreturn redis.call('incr', ARGV\[1\])" 0 $moving]
        lappend waiting [send_command 0 fcall anywhere 0 $moving]
        foreach rd $waiting {wait_client_waits 0 $rd}
        assert_equal {1 fenced} [list [R 0 get $moving] [job_field 0 $id state]]
        let_go preparing 0 2
        wait_migrated 0 2 $id
        assert_match "*MOVED 10 *:[node_port 2]" [reply_of [lindex $waiting 0]]
        # Without keys they run where they were sent, and may not touch what has gone.
        foreach rd [lrange $waiting 1 end] {assert_match "*non local key*" [reply_of $rd]}
        assert_equal 1 [R 2 get $moving]
        assert_equal 1 [job_field 0 $id attempt]
        R 0 function flush
    }

    test "A script that runs when the fence could go up: it goes up after it, with all that it wrote" {
        fresh
        R 0 set $moving 0
        R 0 config set busy-reply-threshold 50
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 20 node [node_id 2] hold] 0]
        wait_for_condition 1000 10 {[string match "*ready and held*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
        # It writes until it reads that the job was released, from the node's clock alone.
        set script [send_command 0 eval {
            local function now() local t = redis.call('time') return t[1]*1000 + t[2]/1000 end
            local until_ms, n = now() + 1200, 0
            while now() < until_ms do n = redis.call('incr', KEYS[1]) end
            return n} 1 $moving]
        wait_for_condition 500 10 {[catch {R 0 ping} reply] && [string match BUSY* $reply]} else {fail "the script is not busy"}
        assert_equal OK [R 2 cluster alter-slot-migration id $id release]
        set n [reply_of $script]
        wait_migrated 0 2 $id
        assert_equal $n [R 2 get $moving]
        R 0 config set busy-reply-threshold 5000
    }

    test "A script that keeps the target busy behind the fence costs no write" {
        fresh
        R 0 set $moving 0
        R 2 config set busy-reply-threshold 50
        set id [hold_in_phase prepared 0 2 5 20]
        set script [send_command 2 eval {
            local function now() local t = redis.call('time') return t[1]*1000 + t[2]/1000 end
            local until_ms = now() + 2500
            while now() < until_ms do end
            return 'ran'} 0]
        wait_for_condition 500 10 {[catch {R 2 ping} reply] && [string match BUSY* $reply]} else {fail "the script is not busy"}
        set writer [send_command 0 incr $moving]
        failpoint 0 source_before_commit off
        set reply [reply_of $writer]
        assert_equal ran [reply_of $script]
        wait_migrated 0 2 $id
        if {$reply ne "1"} {assert_match "MOVED 10 *:[node_port 2]" $reply}
        assert_equal [expr {$reply eq "1"}] [R 2 get $moving]
        R 2 config set busy-reply-threshold 5000
    }

    test "Transactions behind the fence wait as a whole if they write to a moving slot, and only then" {
        fresh
        R 0 set $moving 1
        set id [hold_in_phase preparing 0 2 5 20]
        R 0 multi
        R 0 get $moving
        R 0 strlen $moving
        assert_equal {1 1} [R 0 exec]
        R 0 multi
        R 0 ping
        R 0 publish channel x
        R 0 exec
        set rd [send_command 0 multi]
        $rd get $moving
        $rd append $moving x
        $rd exec
        # At the command that writes, when it is to be queued.
        assert_equal {OK QUEUED} [list [$rd read] [$rd read]]
        wait_client_waits 0 $rd
        assert_equal fenced [job_field 0 $id state]
        let_go preparing 0 2
        wait_migrated 0 2 $id
        assert_match "*MOVED 10 *:[node_port 2]" [reply_of $rd]
        assert_equal 1 [R 2 get $moving]
        assert_equal 1 [job_field 0 $id attempt]
    }

    test "A flush in a transaction behind the fence does not wait, and no key outlives it" {
        fresh
        R 0 set $moving 1
        set id [hold_in_phase preparing 0 2 5 20]
        R 0 multi
        R 0 flushall
        R 0 set $other 1
        assert_equal {OK OK} [R 0 exec]
        let_go preparing 0 2
        wait_migrated 0 2 $id
        assert_morethan [job_field 0 $id attempt] 1
        assert_equal {0 1} [list [R 2 dbsize] [R 0 dbsize]]
    }

    test "What a module's timer writes behind the fence makes it a new attempt, and is not lost" {
        fresh
        load_timer_module 0
        R 0 set $moving 1
        foreach phase {preparing prepared} expected {2 3} {
            set id [hold_in_phase $phase 0 2 5 20]
            set attempt [job_field 0 $id attempt]
            R 0 test.createtimer 1 $moving
            wait_for_condition 1000 10 {[R 0 get $moving] == $expected} else {fail "the timer does not write: [R 0 get $moving]"}
            let_go $phase 0 2
            wait_migrated 0 2 $id
            assert_morethan [job_field 0 $id attempt] $attempt
            assert_equal $expected [R 2 get $moving]
            move_slots 2 0 5 20
        }
        R 0 module unload timer
    }

    test "A timer's write to another slot behind the fence costs no attempt" {
        fresh
        load_timer_module 0
        R 0 set $moving 1
        set id [hold_in_phase preparing 0 2 5 20]
        R 0 test.createtimer 1 $other
        wait_for_condition 1000 10 {[R 0 get $other] == 1} else {fail "the timer does not write"}
        let_go preparing 0 2
        wait_migrated 0 2 $id
        assert_equal 1 [job_field 0 $id attempt]
        R 0 module unload timer
    }

    test "No command that only looks deletes an expired key of a moving slot behind the fence; elsewhere it expires" {
        fresh
        R 0 debug set-active-expire 0
        R 0 set $moving x px 200
        R 0 set $other x px 200
        R 0 set [key_in 10 stays] x
        R 0 hset [key_in 10 hash] f v g w
        R 0 hpexpire [key_in 10 hash] 200 fields 1 f
        set id [hold_in_phase prepared 0 2 5 20]
        wait_for_condition 500 10 {[R 0 pttl $moving] == -2 && [R 0 hlen [key_in 10 hash]] >= 1 && [R 0 hget [key_in 10 hash] f] eq ""} else {fail "nothing expires"}
        foreach command [list \
            [list get $moving] [list strlen $moving] [list exists $moving] [list type $moving] [list ttl $moving] [list touch $moving] \
            [list object encoding $moving] [list dump $moving] [list memory usage $moving] [list getrange $moving 0 -1] \
            [list keys *] [list scan 0 count 1000] [list randomkey] [list dbsize] [list sort_ro $moving] [list bitcount $moving] \
            [list lcs $moving [key_in 10 stays]] [list hgetall [key_in 10 hash]] [list hscan [key_in 10 hash] 0] \
        ] {
            catch {R 0 {*}$command}
            assert_equal 3 [R 0 cluster countkeysinslot 10] $command
        }
        R 0 debug set-active-expire 1
        # Elsewhere a key is deleted at its access, and written again.
        assert_equal 1 [R 0 incr $other]
        assert_equal 3 [R 0 cluster countkeysinslot 10]
        assert_equal 1 [job_field 0 $id attempt]
        let_go prepared 0 2
        wait_migrated 0 2 $id
        assert_equal 1 [job_field 0 $id attempt]
        assert_equal {x {}} [list [R 2 get [key_in 10 stays]] [R 2 get $moving]]
        assert_equal {g w} [R 2 hgetall [key_in 10 hash]]
        wait_for_condition 500 10 {[R 2 cluster countkeysinslot 10] == 2} else {fail "the target does not expire the key"}
    }

    test "Nothing is evicted behind the fence, and eviction goes on after it" {
        fresh
        fill_strings 0 {10 11 4000} 3000 200
        set id [hold_in_phase preparing 0 2 5 20]
        set before [slots_dump 0 {10 11}]
        R 0 config resetstat
        R 0 config set maxmemory-policy allkeys-random
        R 0 config set maxmemory [expr {[status [Rn 0] used_memory]-200000}]
        for {set i 0} {$i < 20} {incr i} {R 0 set [key_in 4000 new$i] x}
        assert_equal 0 [status [Rn 0] evicted_keys]
        assert_equal 2000 [expr {[R 0 cluster countkeysinslot 10]+[R 0 cluster countkeysinslot 11]}]
        let_go preparing 0 2
        wait_job_state 2 $id done
        assert_same_dump $before [slots_dump 2 {10 11}]
        assert_equal 1 [job_field 2 $id attempt]
        R 0 config set maxmemory 2mb
        wait_for_condition 500 10 {[status [Rn 0] evicted_keys] > 0} else {fail "nothing is evicted"}
        R 0 config set maxmemory 0
        R 0 config set maxmemory-policy noeviction
        wait_migrated 0 2 $id
    }

    test "Whoever comes to the target between its PREPARED and its taking over waits there, in whatever way he comes" {
        fresh
        R 0 set $moving 1
        R 0 rpush [key_in 10 list] a
        set id [hold_in_phase prepared 0 2 5 20]
        set waiting {}
        foreach command [list \
            [list get $moving] [list incr $moving] [list blpop [key_in 10 list] 0] [list eval "return redis.call('incr', KEYS\[1\])" 1 $moving] \
            [list eval_ro "return redis.call('exists', KEYS\[1\])" 1 $moving] [list ssubscribe [key_in 10 channel]] [list watch $moving] \
        ] {
            set rd [send_command 2 {*}$command]
            wait_client_waits 2 $rd
            lappend waiting $rd
        }
        # A transaction waits at its first command.
        set transaction [send_command 2 multi]
        $transaction incr $moving
        $transaction exec
        $transaction read
        wait_client_waits 2 $transaction
        # For other slots nothing has changed.
        assert_error "MOVED 4000 *:[node_port 0]" {R 2 get $other}
        R 2 set [key_in 16000 own] 1
        let_go prepared 0 2
        wait_migrated 0 2 $id
        set replies [lmap rd $waiting {reply_of $rd}]
        assert_equal [list 1 2 [list [key_in 10 list] a] 3 1 [list ssubscribe [key_in 10 channel] 1] OK] $replies
        assert_equal QUEUED [$transaction read]
        assert_equal 4 [reply_of $transaction]
        assert_equal 1 [job_field 0 $id attempt]
    }

    foreach {how expected} {discarded MOVED cancelled MOVED} {
        test "PEERS 37: who waits at the target is sent back at once when the attempt is $how, and served by the source" {
            fresh
            R 0 set $moving 1
            set id [hold_in_phase prepared 0 2 5 20]
            set rd [send_command 2 incr $moving]
            wait_client_waits 2 $rd
            if {$how eq "discarded"} {
                R 0 cluster alter-slot-migration id $id hold
            } else {
                R 0 cluster cancel-slot-migrations id $id
            }
            assert_match "MOVED 10 *:[node_port 0]" [reply_of $rd]
            assert_equal 2 [R 0 incr $moving]
            failpoints_off 0
            if {$how eq "discarded"} {
                R 0 cluster alter-slot-migration id $id release
                wait_migrated 0 2 $id
                assert_equal 3 [R 2 incr $moving]
            }
        }
    }

    test "PEERS 9, 16: CLIENT PAUSE, FLUSHALL and CLUSTER FAILOVER of a node with two jobs end neither" {
        fresh
        fill_strings 0 {5 6} 100
        failpoint 0 source_before_cut pause
        set first [migrate 0 1 5 5]
        set second [migrate 0 2 6 6]
        foreach id [list $first $second] {wait_job_state 0 $id streaming}
        foreach n {0 1 2} {
            R $n client pause 100000 write
            assert_error "*to a replica*" {R $n cluster failover}
        }
        foreach n {0 1 2} {R $n client unpause}
        foreach n {2 1 0} {R $n flushall}
        fill_strings 0 {5 6} 50
        set before [slots_dump 0 {5 6}]
        R 1 client pause 100000 write
        R 2 client pause 100000 write
        failpoint 0 source_before_cut off
        wait_job_state 0 $first done
        wait_job_state 0 $second done
        foreach n {1 2} {R $n client unpause}
        assert_same_dump $before [dict merge [slots_dump 1 5] [slots_dump 2 6]]
        assert_equal 0 [R 0 dbsize]
    }

    test "PEERS 35: writers that cannot be made to wait end in attempts that are given up, not in a fence that stays" {
        fresh
        load_timer_module 0
        R 0 set $moving 0
        failpoint 2 target_before_prepared pause
        set id [migrate 0 2 5 20]
        for {set i 1} {$i <= 3} {incr i} {
            wait_job_state 0 $id fenced
            R 0 test.createtimer 1 $moving
            wait_for_condition 1000 10 {[R 0 get $moving] == $i && [job_field 0 $id attempt] > $i} else {fail "[job 0 $id]"}
            # Between the attempts everybody writes.
            assert_equal OK [R 0 set $other $i]
        }
        failpoint 2 target_before_prepared off
        wait_migrated 0 2 $id
        assert_equal 3 [R 2 get $moving]
        R 0 module unload timer
    }

    foreach phase {offered waiting snapshot streaming preparing prepared} {
        test "PEERS 8: a job cancelled at its source while $phase stays cancelled, and is in nobody's way" {
            fresh
            fill_moving 0
            set before [slots_dump 0 {5 6 7}]
            set pids [node_pids]
            set id [hold_in_phase $phase 0 2 5 7]
            assert_equal 1 [R 0 cluster cancel-slot-migrations id $id]
            assert_equal cancelled [wait_job_ended 0 $id]
            let_go $phase 0 2
            wait_for_condition 1500 10 {[jobs_running 0]+[jobs_running 2] == 0} else {fail "[R 2 cluster slot-migrations]"}
            if {$phase ne "offered"} {assert_equal cancelled [wait_job_ended 2 $id]}
            assert_equal 0 [assert_one_owner {5 6 7} $before $pids]
            foreach {n state other} {0 migrating 2 2 importing 0} {
                R $n cluster setslot 6 $state [node_id $other]
                R $n cluster setslot 6 stable
            }
            assert_equal [list 0 0 cancelled] [list [jobs_running 0] [jobs_running 2] [job_field 0 $id state]]
            move_slots 0 2 5 7
            assert_equal 2 [assert_one_owner {5 6 7} $before $pids]
        }
    }

    foreach {phase node answer states owner} {
        prepared  0 1                           {cancelled cancelled} 0
        prepared  2 "*can only be completed*"   {done done}           2
        committed 0 "*can only be completed*"   {done done}           2
        bound     2 "*can only be completed*"   {done done}           2
        trimming  0 "*can only be completed*"   {done done}           2
    } {
        test "PEERS 24: CANCEL at the [expr {$node ? "target" : "source"}] of a job that is $phase: both ends say the same, and it is so" {
            fresh
            fill_moving 0
            set before [slots_dump 0 {5 6 7}]
            set pids [node_pids]
            set id [hold_in_phase $phase 0 2 5 7]
            assert_match $answer [answer $node cluster cancel-slot-migrations id $id]
            if {$owner == 2} {assert_equal 0 [R $node cluster cancel-slot-migrations all]}
            let_go $phase 0 2
            assert_equal $states [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
            assert_equal $owner [assert_one_owner {5 6 7} $before $pids]
        }
    }

    test "PEERS 32: with the last word lost, no moment has two nodes that serve a slot" {
        fresh
        R 0 set $moving 1
        failpoint 2 target_after_takeover fail
        set late [redis_deferring_client 0]
        set id [hold_in_phase bound 0 2 5 20]
        # The source has committed and hangs; until it has said so nobody serves.
        set early [send_command 2 incr $moving]
        wait_client_waits 2 $early
        $late incr $moving
        let_go bound 0 2
        assert_match "MOVED 10 *:[node_port 2]" [reply_of $late]
        assert_equal 2 [reply_of $early]
        assert_error "MOVED 10 *:[node_port 2]" {R 0 incr $moving}
        failpoint 2 target_after_takeover off
        wait_migrated 0 2 $id
        assert_equal 3 [R 2 incr $moving]
    }

    test "PEERS 25: the cluster bus is lost at the hand-off, the two agree without it, and no write is lost" {
        fresh
        fill_moving 0
        set pids [node_pids]
        R 0 set [key_in 5 waits] 0
        set id [hold_in_phase prepared 0 2 5 7]
        # Nothing that the target says on the bus is heard: it sends no PINGs, and PONGs are lost.
        set_node_timeouts 600000
        R 2 debug pause-cron 1
        foreach n {0 1} {R $n debug drop-cluster-packet-filter 1}
        set writer [send_command 0 incr [key_in 5 waits]]
        wait_client_waits 0 $writer
        let_go prepared 0 2
        assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
        assert_match "MOVED 5 *:[node_port 2]" [reply_of $writer]
        # A third node knows nothing yet and sends clients to the source, that sends them on.
        assert_error "MOVED 5 *:[node_port 0]" {R 1 get [key_in 5 waits]}
        assert_error "MOVED 5 *:[node_port 2]" {R 0 incr [key_in 5 waits]}
        assert_equal 1 [R 2 incr [key_in 5 waits]]
        set before [slots_dump 2 {5 6 7}]
        R 2 debug pause-cron 0
        foreach n {0 1} {R $n debug drop-cluster-packet-filter -1}
        set_node_timeouts 3000
        assert_equal 2 [assert_one_owner {5 6 7} $before $pids]
    }
}
