# The hand-off: who waits, who does not, and what each client sees of it.

source tests/support/slot_migration.tcl

# A job that stands with the slots fenced at node 0, until `release`.
proc fence {args} {
    failpoint 2 target_before_prepared pause
    set id [migrate 0 2 {*}$args]
    wait_job_state 0 $id fenced
    return $id
}

proc release {id} {
    failpoint 2 target_before_prepared off
    wait_migrated 0 2 $id
}

proc client_waits {n rd} {
    set line [R $n client list id $::client_of($rd)]
    regexp {flags=(\S+)} $line -> flags
    string match *b* $flags
}

proc wait_client_waits {n rd} {
    wait_for_condition 500 10 {[client_waits $n $rd]} else {
        fail "the client does not wait: [R $n client list]"
    }
}

# What a client gets: its reply, or its error.
proc reply_of {rd} {
    catch {$rd read} reply
    $rd close
    return $reply
}

start_cluster 3 0 {tags {external:skip cluster}} {
    set moving [key_in 10 k]
    set other [key_in 4000 k]

    test "Nobody waits for the disk who just hears that slots moved; who promises something does" {
        fresh
        # What the nodes themselves did to become a cluster is on the disk with the first that they hear.
        wait_migrated 0 2 [migrate 0 2 100 100]
        wait_for_cluster_propagation
        foreach n {0 1 2} {failpoint $n config_waits_for_disk fail}
        foreach turn {1 2 3} {
            lassign [expr {$turn%2 ? {0 2} : {2 0}}] from to
            wait_migrated $from $to [migrate $from $to 0 99]
        }
        wait_for_cluster_propagation
        foreach n {0 1 2} {assert_equal "0 $n" "[reached $n config_waits_for_disk] $n"}
        # What they heard comes to their files all the same, and nothing stays beside these.
        regexp {myself[^\n]* connected ([^\n]*)} [R 2 cluster nodes] -> slots
        foreach n {0 1 2} {
            set dir [lindex [R $n config get dir] 1]
            wait_for_condition 500 10 {[regexp "[R 2 cluster myid]\[^\n\]* connected $slots\n" [read_file $dir/nodes.conf]] &&
                ![llength [glob -nocomplain $dir/nodes.conf?*]]} else {
                fail "node $n: [glob -nocomplain $dir/nodes.conf*], [read_file $dir/nodes.conf]"
            }
        }
        R 1 cluster bumpepoch
        wait_for_condition 500 10 {[reached 1 config_waits_for_disk] > 0} else {fail "an epoch of its own, and it did not wait"}
        assert_equal 0 [reached 0 config_waits_for_disk]
        # Where the background could not, it is done again in the foreground.
        foreach n {0 2} {failpoint $n config_sync_fails fail}
        wait_migrated 2 0 [migrate 2 0 0 99]
        foreach n {0 2} {
            assert_morethan [reached $n config_waits_for_disk] 0
            failpoint $n config_sync_fails off
        }
        foreach n {0 1 2} {failpoint $n config_waits_for_disk off}
    }

    test "Behind the fence writes to the moving slots wait and all else goes on" {
        fresh
        R 0 mset $moving 1 [key_in 10 second] 2
        R 0 rpush [key_in 10 list] a b
        R 0 function load {#!lua name=lib
            redis.register_function('write', function(keys) return redis.call('incr',keys[1]) end)}
        set transaction [send_command 0 multi]
        $transaction read
        $transaction incr $moving
        $transaction read
        set id [fence 5 20]
        # Reads of the moving slots, and writes to the others.
        assert_equal 1 [R 0 get $moving]
        assert_equal {a b} [R 0 lrange [key_in 10 list] 0 -1]
        assert_equal 1 [R 0 eval_ro {return redis.call('exists',KEYS[1])} 1 $moving]
        assert_equal OK [R 0 set $other 1]
        assert_equal 2 [R 0 eval {return redis.call('incr',KEYS[1])} 1 $other]
        assert_equal 3 [R 0 fcall write 1 $other]
        R 0 multi
        R 0 incr $other
        assert_equal 4 [R 0 exec]
        assert_equal 0 [R 0 publish channel message]
        assert_equal 0 [R 0 spublish [key_in 10 channel] message]
        assert_equal "" [R 1 get [key_in 6000 x]]
        # Writes to the moving slots, whatever form they have.
        set waiting {}
        set names [dict create KEY $moving LIST [key_in 10 list] NEW [key_in 10 new]]
        foreach command {
            {set KEY 2} {incr KEY} {del KEY} {expire KEY 100} {getex KEY persist} {blpop LIST 0} {lmove LIST LIST left right}
            {eval "return redis.call('incr',KEYS[1])" 1 KEY} {fcall write 1 KEY} {unlink KEY} {pfcount KEY} {restore NEW 0 x}
        } {
            set argv {}
            foreach word $command {
                lappend argv [expr {[dict exists $names $word] ? [dict get $names $word] : $word}]
            }
            lappend waiting [send_command 0 {*}$argv]
        }
        $transaction exec
        lappend waiting $transaction
        set late [send_command 0 multi]
        $late read
        $late incr $moving
        lappend waiting $late
        foreach rd $waiting {wait_client_waits 0 $rd}
        # All else still goes on with them there.
        assert_equal 1 [R 0 get $moving]
        assert_equal 5 [R 0 incr $other]
        foreach rd $waiting {assert_equal 1 [client_waits 0 $rd]}
        assert_equal fenced [job_field 0 $id state]
        release $id
        foreach rd $waiting {
            assert_match "*MOVED 10 *:[node_port 2]" [reply_of $rd]
        }
        assert_equal 1 [R 2 get $moving]
        assert_equal {a b} [R 2 lrange [key_in 10 list] 0 -1]
        assert_equal 1 [job_field 0 $id attempt]
        R 0 function flush
    }

    test "Behind the fence a script that could write anywhere waits" {
        fresh
        R 0 set $moving 1
        set id [fence 5 20]
        set script [send_command 0 eval {return 'ran'} 0]
        wait_client_waits 0 $script
        assert_equal 1 [R 0 get $moving]
        release $id
        assert_equal ran [reply_of $script]
        assert_equal 1 [R 2 get $moving]
    }

    test "FLUSHALL behind the fence is not outlived by the keys that move: it takes a new attempt" {
        fresh
        R 0 set $moving 1
        set id [fence 5 20]
        set writer [send_command 0 incr [key_in 10 other]]
        wait_client_waits 0 $writer
        set attempt [job_field 0 $id attempt]
        assert_equal OK [R 0 flushall]
        # Who waited is served, by the source.
        assert_equal 1 [reply_of $writer]
        assert_equal 0 [R 0 exists $moving]
        release $id
        assert_morethan [job_field 0 $id attempt] $attempt
        assert_equal [list [key_in 10 other]] [R 2 keys *]
        assert_equal 0 [R 0 dbsize]
    }

    test "HOLD and PAUSE behind the fence keep the slots where they are, until RELEASE and RESUME" {
        foreach {on off} {hold release pause resume} {
            fresh
            R 0 set $moving 1
            failpoint 0 source_before_commit pause
            set id [migrate 0 2 5 20]
            wait_job_state 0 $id fenced
            set writer [send_command 0 incr $moving]
            wait_client_waits 0 $writer
            assert_equal OK [R 0 cluster alter-slot-migration id $id $on]
            assert_equal 2 [reply_of $writer]
            failpoint 0 source_before_commit off
            wait_job_state 0 $id streaming
            wait_for_condition 500 10 {[string match *$off* [string tolower [job_field 0 $id reason]]]} else {fail "[job 0 $id]"}
            assert_equal 0 [slot_owner 2 10]
            assert_equal 3 [R 0 incr $moving]
            assert_equal OK [R 2 cluster alter-slot-migration id $id $off]
            wait_migrated 0 2 $id
            assert_equal 4 [R 2 incr $moving]
        }
    }

    test "Behind the fence an expired key is not there, but is not deleted either" {
        fresh
        R 0 debug set-active-expire 0
        R 0 set $moving x px 300
        R 0 set [key_in 10 stays] x
        set id [fence 5 20]
        wait_for_condition 500 10 {[R 0 pttl $moving] == -2} else {fail "the key does not expire"}
        assert_equal "" [R 0 get $moving]
        R 0 debug set-active-expire 1
        assert_equal 0 [R 0 exists $moving]
        assert_equal 2 [R 0 cluster countkeysinslot 10]
        release $id
        assert_equal 1 [job_field 0 $id attempt]
        wait_for_condition 500 10 {[R 2 dbsize] == 1} else {fail "the target does not expire the key"}
        assert_equal x [R 2 get [key_in 10 stays]]
    }

    test "A client in a blocking command on a moving slot is redirected at once" {
        fresh
        set list [send_command 0 blpop [key_in 10 list] 0]
        set zset [send_command 0 bzpopmin [key_in 10 zset] 0]
        R 0 xgroup create [key_in 11 stream] g $ mkstream
        set stream [send_command 0 xreadgroup group g c block 0 streams [key_in 11 stream] >]
        set elsewhere [send_command 0 blpop [key_in 4000 list] 0]
        foreach rd [list $list $zset $stream $elsewhere] {wait_client_waits 0 $rd}
        failpoint 0 source_before_trim pause
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 20]
        wait_job_state 0 $id streaming
        # Without the cron, which would redirect them some time later.
        R 0 debug pause-cron 1
        failpoint 0 source_before_cut off
        assert_match "MOVED 10 *:[node_port 2]" [reply_of $list]
        assert_match "MOVED 10 *:[node_port 2]" [reply_of $zset]
        assert_match "MOVED 11 *:[node_port 2]" [reply_of $stream]
        R 0 debug pause-cron 0
        assert_equal 1 [client_waits 0 $elsewhere]
        failpoint 0 source_before_trim off
        wait_migrated 0 2 $id
        R 0 rpush [key_in 4000 list] v
        assert_equal [list [key_in 4000 list] v] [reply_of $elsewhere]
    }

    test "A write that passes the fence, of a script with undeclared keys, makes it a new attempt" {
        fresh
        R 0 set $moving 1
        failpoint 2 target_before_prepared pause
        set id [migrate 0 2 5 20]
        wait_job_state 2 $id preparing
        assert_equal 2 [R 0 eval "return redis.call('incr',ARGV\[1\])" 1 [key_in 4000 x] $moving]
        failpoint 2 target_before_prepared off
        wait_migrated 0 2 $id
        assert_equal 2 [job_field 0 $id attempt]
        assert_equal 2 [R 2 get $moving]
    }

    test "A watched key that moves away makes its transaction fail, others do not" {
        fresh
        R 0 set $moving 1
        set watcher [connect 0]
        $watcher watch $moving
        set other_watcher [connect 0]
        $other_watcher watch $other
        move_slots 0 2 5 20
        $watcher multi
        $watcher get $other
        assert_equal "" [$watcher exec]
        $other_watcher multi
        $other_watcher incr $other
        assert_equal 1 [$other_watcher exec]
        $watcher close
        $other_watcher close
    }

    test "Clients that cache keys of the source are told to forget them" {
        fresh
        R 0 set $moving 1
        lassign [invalidations_of 0] invalidated redirect
        set cacher [connect 0]
        $cacher client tracking on redirect $redirect
        $cacher get $moving
        move_slots 0 2 5 20
        assert_invalidated $invalidated $moving
        $cacher close
        $invalidated close
    }

    test "Subscribers of a moved slot's channel are unsubscribed" {
        fresh
        set rd [redis_deferring_client 0]
        ssubscribe $rd [list [key_in 10 channel]]
        move_slots 0 2 5 20
        assert_equal [list sunsubscribe [key_in 10 channel] 0] [$rd read]
        $rd close
    }

    test "A target that is not prepared in time costs an attempt, not the job nor a write" {
        fresh
        R 0 set $moving 1
        R 0 config set cluster-slot-migration-write-pause-timeout 200
        set id [fence 5 20]
        set rd [send_command 0 incr $moving]
        # It waits behind the fence, which falls, and then is served by the source.
        assert_equal 2 [reply_of $rd]
        wait_for_condition 500 10 {[job_field 0 $id attempt] >= 2} else {fail "no second attempt"}
        assert_equal 0 [slot_owner 2 10]
        R 0 config set cluster-slot-migration-write-pause-timeout 10000
        release $id
        assert_morethan_equal [job_field 0 $id attempt] 2
        assert_equal [job_field 0 $id attempt] [expr {[job_field 0 $id retries]+1}]
        assert_equal 2 [R 2 get $moving]
    }

    test "A client that comes to the target a moment early is held until it is decided" {
        fresh
        R 0 set $moving 1
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 5 20]
        wait_job_state 2 $id prepared
        set early [send_command 2 get $moving]
        wait_client_waits 2 $early
        assert_match "MOVED*" [reply_of [send_command 2 get $other]]
        assert_equal 1 [client_waits 2 $early]
        failpoint 0 source_before_commit off
        wait_migrated 0 2 $id
        assert_equal 1 [reply_of $early]
        assert_equal 1 [job_field 0 $id attempt]
    }

    test "A move costs one epoch, and every node sees the same cluster after it" {
        fresh
        R 0 set $moving 1
        wait_cluster_agrees
        set before [CI 2 cluster_current_epoch]
        set of_source [dict get [cluster_get_myself 0] config_epoch]
        set of_third [dict get [cluster_get_myself 1] config_epoch]
        move_slots 0 2 0 1000 1002 1002 2000 2999
        for {set n 0} {$n < 3} {incr n} {assert_equal [expr {$before+1}] [CI $n cluster_current_epoch]}
        assert_equal [expr {$before+1}] [dict get [cluster_get_myself 2] config_epoch]
        assert_equal $of_source [dict get [cluster_get_myself 0] config_epoch]
        assert_equal $of_third [dict get [cluster_get_myself 1] config_epoch]
        assert_equal {0-1000 1002 2000-2999 10923-16383} [dict get [cluster_get_myself 2] slots]
        assert_equal {1001 1003-1999 3000-5461} [dict get [cluster_get_myself 0] slots]
    }

    test "Under load no acknowledged write is lost, nobody sees ASK or TRYAGAIN, and MOVED once" {
        fresh
        set slots {1 2 3 4 5 3000 7000 12000}
        set writers [start_writers 3 $slots]
        wait_writers_go_on $writers
        set id [migrate 0 2 0 100]
        wait_migrated 0 2 $id
        wait_writers_go_on $writers
        set seen [stop_writers $writers]
        assert_equal {} [dict get $seen errors]
        foreach what {ask tryagain twice} {assert_equal 0 [dict get $seen $what] $what}
        # Each writer learns of two slots at other nodes and of the five that moved.
        assert_equal [expr {3*(2+5)}] [dict get $seen moved]
        assert_equal 1 [job_field 0 $id attempt]
    }

    test "A job opposite to one that runs runs at the same time" {
        fresh
        R 0 set $moving 1
        R 2 set [key_in 16000 k] 2
        failpoint 0 source_before_cut pause
        set there [migrate 0 2 5 20]
        wait_job_state 0 $there streaming
        move_slots 2 0 16000 16000
        move_slots 1 0 6000 6000
        assert_equal streaming [job_field 0 $there state]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $there
        assert_equal 1 [R 2 get $moving]
        assert_equal 2 [R 0 get [key_in 16000 k]]
    }

    test "CLIENT PAUSE at either node does not break a hand-off" {
        foreach n {0 2} {
            fresh
            R 0 set $moving 1
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 5 20]
            wait_job_state 0 $id streaming
            R $n client pause 100000 write
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            R $n client unpause
            assert_equal 1 [R 2 get $moving]
            assert_equal 2 [R 2 incr $moving]
        }
    }

    test "The target's last word is lost and its log shows no ended job: the source hears all the same that the slots were taken" {
        fresh
        R 0 set $moving 1
        foreach n {0 2} {R $n config set cluster-slot-migration-log-max-len 0}
        failpoint 2 target_after_takeover fail
        failpoint 0 source_after_commit fail        ;# and the link is, too: it asks
        set id [migrate 0 2 5 20]
        wait_for_condition 1000 10 {[jobs_running 0] == 0 && [jobs_running 2] == 0} else {fail "[R 0 cluster slot-migrations]"}
        wait_slot_owner 0 5 2
        assert_equal {} [R 2 cluster slot-migrations]
        assert_error "*Unknown slot migration*" {R 2 cluster slot-migrations id $id}
        assert_equal 2 [R 2 incr $moving]
        assert_equal 0 [R 0 dbsize]
        foreach n {0 2} {R $n config set cluster-slot-migration-log-max-len 128}
    }

    test "Blocks to several targets in one command move at the same time" {
        fresh
        R 0 set $moving 1
        R 0 set $other 2
        set ids [R 0 cluster migrate-slots slotsrange 0 99 node [node_id 1] slotsrange 4000 4099 5000 5000 node [node_id 2]]
        assert_equal 2 [llength $ids]
        wait_migrated 0 1 [lindex $ids 0]
        wait_migrated 0 2 [lindex $ids 1]
        assert_equal 1 [R 1 get $moving]
        assert_equal 2 [R 2 get $other]
        assert_equal 2 [slot_owner 1 5000]
    }
}
