# What clients of the source and of the target see of a move: transactions,
# caches, subscriptions, pauses, pipelines. Exactly what changed, once, and in time.

source tests/support/slot_migration.tcl

set ::slots {10 11 12}
# A job of slots 10 to 12 that stands at a fail point of a node.
proc job_at {point node state} {
    failpoint $node $point pause
    set id [migrate 0 2 10 12]
    wait_job_state [expr {$point eq "source_before_commit" ? 2 : $node}] $id $state
    return $id
}

proc half_moved {} {
    set id [job_at source_before_cut 0 streaming]
    wait_job_state 2 $id following
    return $id
}

proc finish {id} {
    failpoints_off 0
    failpoints_off 2
    wait_migrated 0 2 $id
}

# All writes to the slots so far are applied at the target.
proc wait_followed {id} {
    wait_for_condition 500 10 {[job_field 0 $id stream-bytes] > 0 && [job_field 0 $id stream-lag-bytes] == 0} else {
        fail "the target lags: [job 0 $id]"
    }
}

# Each phase: its name, the fail point that holds it, the node of that, the state there.
set ::phases {
    "while sections are on their way" target_before_section 2 loading
    "while writes are followed"       source_before_cut     0 streaming
    "behind the fence"                target_before_prepared 2 preparing
    "while it is prepared"            source_before_commit  0 prepared
}

# A connection whose replies and pushes are read one by one.
proc open_client {n {resp 2}} {
    set rd [redis_deferring_client -$n]
    if {$resp == 3} {
        $rd hello 3
        $rd read
    }
    return $rd
}

proc id_of {rd} {
    $rd client id
    $rd read
}

proc client_waits {n id} {
    expr {[regexp {flags=(\S+)} [R $n client list id $id] -> flags] && [string match *b* $flags]}
}

proc wait_client_waits {n id} {
    wait_for_condition 500 10 {[client_waits $n $id]} else {fail "the client does not wait: [R $n client list]"}
}

# What comes on a connection up to the answer to a PING sent now. A push is read
# as a list, and an error as its text.
proc read_up_to_mark {rd} {
    set mark mark:[incr ::marks]
    $rd ping $mark
    set got {}
    while 1 {
        if {[catch {$rd read} reply]} {set reply [list error $reply]}
        # To a RESP2 client that is subscribed a PING is answered by a list.
        if {$reply eq $mark || $reply eq [list pong $mark]} {return $got}
        lappend got $reply
    }
}

# Keys that invalidation messages name; "*" for one that means all.
proc invalidated {messages} {
    set keys {}
    foreach message $messages {
        switch -glob $message {
            "invalidate *" {set about [lindex $message 1]}
            "message __redis__:invalidate *" {set about [lindex $message 2]}
            default {fail "expected invalidations, got $message"}
        }
        if {$about eq ""} {lappend keys *} else {lappend keys {*}$about}
    }
    return $keys
}

start_cluster 3 0 {tags {external:skip cluster}} {
    set ::marks 0
    set moving [key_in 10 k]
    set second [key_in 10 second]
    set other [key_in 4000 k]

    # ---- WATCH ----

    foreach {phase point node state} $::phases {
        test "A watched key that changes $phase fails its transaction, one that does not, does not" {
            fresh
            R 0 mset $moving 1 $second 2
            if {$state in {preparing prepared}} {failpoint 0 source_before_cut pause} else {failpoint $node $point pause}
            foreach name {changed unchanged} key [list $moving $second] {
                set $name [open_client 0]
                [set $name] watch $key
                [set $name] read
            }
            set id [migrate 0 2 10 12]
            if {$state in {preparing prepared}} {
                # A write behind the fence waits, so it comes just before.
                wait_job_state 0 $id streaming
                R 0 incr $moving
                failpoint $node $point pause
                failpoint 0 source_before_cut off
                wait_job_state 2 $id $state
            } else {
                wait_job_state $node $id $state
                R 0 incr $moving
            }
            foreach rd [list $changed $unchanged] reply {{} 1} {
                $rd multi
                $rd incr $other
                $rd exec
                assert_equal OK [$rd read]
                assert_equal QUEUED [$rd read]
                assert_equal $reply [$rd read]
                $rd close
            }
            finish $id
            assert_equal 2 [R 2 get $moving]
            assert_equal 1 [R 0 get $other]
        }
    }

    test "A key watched at the source and changed at the target fails the transaction, although the source does not know yet" {
        fresh
        R 0 set $moving 1
        set id [job_at source_before_commit 0 prepared]
        set rd [open_client 0]
        foreach command [list [list watch $moving] {multi} [list set $other exec]] {
            $rd {*}$command
            $rd read
        }
        # The target takes over while the source is stopped, and its word about it is lost.
        failpoint 2 target_after_takeover fail
        foreach n {0 1 2} {R $n config set cluster-node-timeout 600000}
        pause_process [node_pid 2]
        failpoint 0 source_before_commit off
        wait_job_state 0 $id committed
        pause_process [node_pid 0]
        resume_process [node_pid 2]
        wait_for_condition 1000 10 {![catch {R 2 set $moving changed}]} else {fail "the target does not take over"}
        $rd exec
        resume_process [node_pid 0]
        set reply [$rd read]
        $rd close
        foreach n {0 1 2} {R $n config set cluster-node-timeout 3000}
        finish $id
        assert_equal {} $reply
        assert_equal "" [R 0 get $other]
    }

    test "WATCH of a moving slot at the target: MOVED before it takes over, then as ever" {
        fresh
        R 0 set $moving 1
        set id [half_moved]
        set rd [connect 2]
        assert_error "MOVED 10 *:[node_port 0]" {$rd watch $moving}
        assert_equal OK [$rd watch [key_in 14000 own]]
        R 0 incr $moving
        wait_followed $id
        $rd multi
        $rd incr [key_in 14000 own]
        assert_equal 1 [$rd exec]
        finish $id
        assert_equal OK [$rd watch $moving]
        assert_equal 3 [R 2 incr $moving]
        $rd multi
        $rd incr $moving
        assert_equal {} [$rd exec]
        assert_equal OK [$rd watch $moving]
        $rd multi
        $rd incr $moving
        assert_equal 4 [$rd exec]
        $rd close
    }

    test "A transaction queued before the move is refused as a whole after it, with what it watched" {
        fresh
        R 0 mset $moving 1 $second 1
        set rd [open_client 0]
        foreach command [list [list watch $moving] {multi} [list incr $moving] [list incr $second]] {
            $rd {*}$command
            $rd read
        }
        move_slots 0 2 10 12
        $rd exec
        catch {$rd read} error
        assert_match "MOVED 10 *:[node_port 2]" $error
        assert_equal {1 1} [R 2 mget $moving $second]
        # The connection is as new: no transaction, nothing watched.
        $rd exec
        catch {$rd read} error
        assert_match "*EXEC without MULTI*" $error
        $rd close
    }

    # ---- caches ----

    foreach {mode options} {
        "by default" {} "with NOLOOP" {noloop} "with OPTIN" {optin} "with OPTOUT" {optout}
        "with BCAST" {bcast} "with BCAST and a prefix" {bcast prefix PREFIX} "with BCAST, a prefix and NOLOOP" {bcast prefix PREFIX noloop}
    } {
        foreach {kind resp redirect} {RESP3 3 0 "RESP3 and REDIRECT" 3 1 "RESP2 and REDIRECT" 2 1} {
            test "A client that caches $mode, $kind, is told of what changes, and of the move once it is made" {
                fresh
                R 0 mset $moving 1 $second 1
                set told [open_client 0 $resp]
                set id [id_of $told]
                set rd $told
                set by ""
                if {$redirect} {
                    set rd [open_client 0 $resp]
                    if {$resp == 2} {
                        $told subscribe __redis__:invalidate
                        $told read
                    }
                    set by "redirect $id"
                }
                $rd client tracking on {*}$by {*}[lmap word $options {expr {$word eq "PREFIX" ? [key_in 10 ""] : $word}}]
                assert_equal OK [$rd read]
                foreach key [list $moving $second] {
                    if {$options eq "optin"} {
                        $rd client caching yes
                        assert_equal OK [$rd read]
                    }
                    $rd get $key
                    assert_equal 1 [$rd read]
                }
                set job [half_moved]
                assert_equal {} [invalidated [read_up_to_mark $told]]
                R 0 incr $moving
                assert_equal [list $moving] [invalidated [read_up_to_mark $told]]
                wait_followed $job
                finish $job
                assert_equal * [lsort -unique [invalidated [read_up_to_mark $told]]]
                # Told already: no more, and tracking goes on.
                assert_equal OK [R 2 set $moving 2]
                assert_equal OK [R 0 set $other 2]
                set more [expr {$options eq "bcast" ? [list $other] : {}}]
                assert_equal $more [invalidated [read_up_to_mark $told]]
                if {$redirect} {$rd close}
                $told close
            }
        }
    }

    test "Clients of the target that track keys hear nothing of an import" {
        fresh
        fill_strings 0 $::slots 300
        R 0 mset $moving 1 $second 1
        set job [job_at target_before_section 2 loading]
        # All keys, those of the slot, and one that has cached a key of its own.
        set all [open_client 2 3]
        set slot [open_client 2 3]
        set plain [open_client 2 3]
        R 2 set [key_in 14000 own] 1
        foreach rd [list $all $slot $plain] options [list bcast [list bcast prefix [key_in 10 ""]] ""] {
            $rd client tracking on {*}$options
            assert_equal OK [$rd read]
        }
        $plain get [key_in 14000 own]
        assert_equal 1 [$plain read]
        # Queued, applied to what is there, expired, deleted.
        R 0 incr $moving
        R 0 set [key_in 10 short] x px 1
        failpoint 0 source_before_cut pause
        failpoint 2 target_before_section off
        wait_job_state 2 $job following
        wait_followed $job
        R 0 incr $moving
        R 0 del $second
        R 0 hset [key_in 11 hash] f v
        R 0 hpexpire [key_in 11 hash] 1 fields 1 f
        wait_for_condition 500 10 {[R 0 exists [key_in 11 hash]] == 0 && [R 0 exists [key_in 10 short]] == 0} else {fail "they do not expire"}
        wait_followed $job
        foreach rd [list $all $slot $plain] name {all slot plain} {
            assert_equal {} [invalidated [read_up_to_mark $rd]] "told to $name"
        }
        finish $job
        # From now on these are the target's own.
        R 2 incr $moving
        foreach rd [list $all $slot $plain] expected [list [list $moving] [list $moving] {}] {
            assert_equal $expected [invalidated [read_up_to_mark $rd]]
            $rd close
        }
    }

    # ---- subscriptions ----

    test "Sharded channels: each message once until the hand-off, then an unsubscription, then at the target" {
        fresh
        R 0 set $moving 1
        set channel [key_in 10 channel]
        set stays [key_in 4000 channel]
        set rd [open_client 0]
        ssubscribe $rd [list $channel]
        ssubscribe $rd [list $stays]
        failpoint 2 target_before_section pause
        set expected {}
        foreach {phase point node state} $::phases {
            failpoint $node $point pause
            if {$state eq "loading"} {set id [migrate 0 2 10 12]} else {failpoint {*}$last off}
            set last [list $node $point]
            wait_job_state [expr {$point eq "source_before_commit" ? 2 : $node}] $id $state
            foreach to [list $channel $stays] {
                assert_equal 1 [R 0 spublish $to $state]
                lappend expected [list smessage $to $state]
            }
            # Nobody listens at the target, and it says whom to ask (or waits, when it is prepared).
            if {$state ne "prepared"} {
                assert_error "MOVED 10 *:[node_port 0]" {R 2 spublish $channel elsewhere}
                assert_error "MOVED 10 *:[node_port 0]" {[redis_client -2] ssubscribe $channel}
            }
        }
        set early [open_client 2]
        set early_id [id_of $early]
        $early ssubscribe $channel
        wait_client_waits 2 $early_id
        finish $id
        assert_equal [list ssubscribe $channel 1] [$early read]
        lappend expected [list sunsubscribe $channel 1]
        assert_equal $expected [read_up_to_mark $rd]
        assert_error "MOVED 10 *:[node_port 2]" {R 0 spublish $channel late}
        assert_equal 1 [R 0 spublish $stays late]
        assert_equal 1 [R 2 spublish $channel late]
        assert_equal [list [list smessage $channel late]] [read_up_to_mark $early]
        assert_equal [list [list smessage $stays late]] [read_up_to_mark $rd]
        # Gone for good: what comes back is not subscribed again.
        move_slots 2 0 10 12
        assert_equal [list [list sunsubscribe $channel 0]] [read_up_to_mark $early]
        assert_equal 0 [R 0 spublish $channel back]
        assert_equal {} [read_up_to_mark $rd]
        $rd close
        $early close
    }

    test "PUBLISH at any node reaches each subscriber once in each phase of a move" {
        fresh
        R 0 set $moving 1
        foreach n {0 1 2} {
            set subscriber($n) [open_client $n]
            subscribe $subscriber($n) {news}
        }
        failpoint 2 target_before_section pause
        foreach {phase point node state} $::phases {
            failpoint $node $point pause
            if {$state eq "loading"} {set id [migrate 0 2 10 12]} else {failpoint {*}$last off}
            set last [list $node $point]
            wait_job_state [expr {$point eq "source_before_commit" ? 2 : $node}] $id $state
            foreach n {0 2} {R $n publish news $state:$n}
        }
        finish $id
        foreach n {0 2} {R $n publish news after:$n}
        set expected {}
        foreach from {0 2} {
            lappend expected {*}[lmap state {loading streaming preparing prepared after} {list message news $state:$from}]
        }
        foreach n {0 1 2} {
            set got {}
            wait_for_condition 500 10 {[llength [lappend got {*}[read_up_to_mark $subscriber($n)]]] >= 10} else {fail "messages are lost: $got"}
            assert_equal [lsort $expected] [lsort $got] "node $n"
            $subscriber($n) close
        }
    }

    test "Keyspace notifications of the moving slots: at the source until the hand-off, at the target after it" {
        fresh
        foreach n {0 2} {R $n config set notify-keyspace-events KEA}
        R 0 set $moving 1
        R 0 rpush [key_in 11 list] a b c
        foreach n {0 2} {
            set events($n) [open_client $n]
            psubscribe $events($n) __key*
        }
        set id [half_moved]
        R 0 set $second v px 1
        wait_for_condition 500 10 {[R 0 exists $second] == 0} else {fail "no expiry"}
        R 0 lpop [key_in 11 list]
        R 0 copy [key_in 11 list] [key_in 11 copy]
        R 0 del [key_in 11 list]
        wait_followed $id
        proc of_events {messages} {
            set seen {}
            foreach message $messages {
                if {[string match __keyevent* [lindex $message 2]]} {
                    lappend seen [lindex [split [lindex $message 2] :] end] [lindex $message 3]
                }
            }
            return $seen
        }
        set at_source [read_up_to_mark $events(0)]
        assert_equal [list set $second expire $second expired $second lpop [key_in 11 list] \
            copy_to [key_in 11 copy] del [key_in 11 list]] [of_events $at_source]
        assert_equal 12 [llength $at_source]
        finish $id
        assert_equal {} [read_up_to_mark $events(0)] "to go is no event of a key"
        assert_equal {} [read_up_to_mark $events(2)] "to arrive is none either"
        R 2 incr $moving
        assert_equal [list incrby $moving] [of_events [read_up_to_mark $events(2)]]
        assert_equal {} [read_up_to_mark $events(0)]
        foreach n {0 2} {
            R $n config set notify-keyspace-events ""
            $events($n) close
        }
    }

    test "INFO and LATENCY of the target count none of an import's commands, hits, events or bytes of clients" {
        fresh
        fill_strings 0 $::slots 5000
        R 2 config set latency-tracking yes
        set id [job_at target_before_section 2 loading]
        R 2 config resetstat
        R 2 latency reset
        set before {}
        proc counted {n} {
            foreach field {keyspace_hits keyspace_misses expired_keys evicted_keys tracking_total_keys total_error_replies
                unexpected_error_replies slave_expires_tracked_keys active_defrag_hits pubsub_channels blocked_clients} {
                dict set counts $field [getInfoProperty [R $n info stats] $field]
            }
            dict set counts errorstats [R $n info errorstats]
            dict set counts keyspace [regsub {,avg_ttl=\d+} [R $n info keyspace] ""]
            return $counts
        }
        set before [counted 2]
        set commands [regexp -all -inline {cmdstat_([a-z|-]+):} [R 2 info commandstats]]
        failpoint 0 source_before_cut pause
        failpoint 2 target_before_section off
        wait_job_state 0 $id streaming
        for {set i 0} {$i < 500} {incr i} {
            R 0 lpush [key_in 10 list] $i
            catch {R 0 lpush $moving $i}
        }
        catch {R 0 incr [key_in 10 list]}
        R 0 sadd [key_in 10 set] a
        R 0 sunionstore [key_in 10 union] [key_in 10 set] [key_in 10 none]
        wait_followed $id
        assert_equal $before [counted 2]
        foreach name {lpush rpush set restore del} {
            assert_equal "" [cmdrstat $name [Rn 2]]
            assert_no_match "*latency_percentiles_usec_$name:*" [R 2 info latencystats]
        }
        assert_equal {} [R 2 latency histogram lpush]
        finish $id
    }

    # ---- who waits ----

    test "Each kind of blocking command on a moving slot is redirected at once, the others wait on" {
        fresh
        R 0 xadd [key_in 11 stream] 1-1 f v
        set waiting {}
        foreach command [list \
            [list blpop [key_in 10 a] 0]               [list brpop [key_in 10 a] [key_in 10 b] 0] \
            [list blmove [key_in 10 a] [key_in 10 b] left right 0] [list blmpop 0 1 [key_in 10 a] left] \
            [list bzpopmin [key_in 12 z] 0]            [list bzpopmax [key_in 12 z] 0] \
            [list bzmpop 0 1 [key_in 12 z] min]        [list brpoplpush [key_in 10 a] [key_in 10 c] 0] \
            [list xread block 0 streams [key_in 11 stream] $]
        ] {
            set rd [open_client 0]
            lappend waiting $rd [id_of $rd]
            $rd {*}$command
        }
        set stays [open_client 0]
        set stays_id [id_of $stays]
        $stays xread block 0 streams [key_in 4000 stream] 0
        # WAIT is for replicas, of which there are none: its time-out counts.
        set wait [open_client 0]
        set wait_id [id_of $wait]
        $wait set $other x
        $wait wait 1 0
        assert_equal OK [$wait read]
        foreach {rd id} $waiting {wait_client_waits 0 $id}
        foreach id [list $stays_id $wait_id] {wait_client_waits 0 $id}
        set job [half_moved]
        # Served while it moves, as ever.
        R 0 rpush [key_in 10 a] one
        assert_equal [list [key_in 10 a] one] [[lindex $waiting 0] read]
        [lindex $waiting 0] close
        foreach {rd id} [set waiting [lrange $waiting 2 end]] {assert_equal 1 [client_waits 0 $id]}
        R 0 debug pause-cron 1
        failpoint 0 source_before_cut off
        foreach {rd id} $waiting {
            catch {$rd read} error
            assert_match "MOVED 1? *:[node_port 2]" $error
            # The connection serves on.
            $rd get $other
            assert_equal x [$rd read]
            $rd close
        }
        R 0 debug pause-cron 0
        finish $job
        foreach {rd id} [list $stays $stays_id $wait $wait_id] {assert_equal 1 [client_waits 0 $id]}
        R 0 client unblock $wait_id
        assert_equal 0 [$wait read]
        R 0 xadd [key_in 4000 stream] 5-5 f v
        assert_match "*5-5 {f v}*" [$stays read]
        $wait close
        $stays close
    }

    test "Clients that wait behind the fence can be killed, can quit and can be unblocked by nothing else" {
        fresh
        R 0 set $moving 1
        set id [job_at target_before_prepared 2 preparing]
        wait_job_state 0 $id fenced
        foreach name {killed quits resets gone stays} {
            set $name [open_client 0]
            set id_$name [id_of [set $name]]
            [set $name] incr $moving
        }
        $quits quit
        $resets reset
        foreach client [list $id_killed $id_quits $id_resets $id_gone $id_stays] {wait_client_waits 0 $client}
        assert_equal 0 [R 0 client unblock $id_stays]
        assert_equal 1 [R 0 client kill id $id_killed]
        assert_error "*I/O error*" {$killed read}
        $gone close
        wait_for_condition 500 10 {[R 0 client list id $id_gone] eq "" && [R 0 client list id $id_killed] eq ""} else {fail "they stay: [R 0 client list]"}
        foreach client [list $id_quits $id_resets $id_stays] {assert_equal 1 [client_waits 0 $client]}
        assert_equal 1 [R 0 get $moving]
        finish $id
        foreach rd [list $quits $resets $stays] {
            catch {$rd read} error
            assert_match "MOVED 10 *:[node_port 2]" $error
        }
        assert_equal OK [$quits read]
        assert_equal RESET [$resets read]
        foreach rd [list $killed $quits $resets $stays] {$rd close}
        assert_equal 1 [R 2 get $moving]
        assert_equal 0 [getInfoProperty [R 0 info clients] blocked_clients]
    }

    foreach way {"falls" "lets the slots go"} {
        test "A killed waiter's write is not made when the fence $way" {
            fresh
            R 0 set $moving 1
            set id [job_at target_before_prepared 2 preparing]
            wait_job_state 0 $id fenced
            foreach name {killed waits} {
                set $name [open_client 0]
                set id_$name [id_of [set $name]]
                [set $name] append $moving :$name
                wait_client_waits 0 [set id_$name]
            }
            R 0 client kill id $id_killed
            if {$way eq "falls"} {
                R 0 cluster cancel-slot-migrations id $id
                assert_equal 7 [$waits read]
                assert_equal 1:waits [R 0 get $moving]
                failpoint 2 target_before_prepared off
                wait_for_condition 500 10 {[jobs_running 2] == 0} else {fail "the target goes on"}
            } else {
                finish $id
                catch {$waits read} error
                assert_match "MOVED 10 *" $error
                assert_equal 1 [R 2 get $moving]
            }
            $waits close
            $killed close
        }
    }

    test "Writers that are slowed hold up nobody else, can be killed, and none of their writes is lost or made twice" {
        fresh
        R 0 config set cluster-slot-migration-buffer-limit 1mb
        set id [job_at target_before_section 2 loading]
        foreach name {first second} {
            set $name [open_client 0]
            set id_$name [id_of [set $name]]
        }
        # As fast as it can, until it has to wait.
        for {set i 0} {$i < 40} {incr i} {$first rpush [key_in 10 list] [format %0100000d $i]}
        wait_client_waits 0 $id_first
        wait_for_condition 500 10 {[job_field 0 $id writers-rate-limit] > 0} else {fail "[job 0 $id]"}
        $second incr $moving
        wait_client_waits 0 $id_second
        # Reads of the slots, and all that is about others.
        assert_morethan [R 0 llen [key_in 10 list]] 1
        assert_equal "" [R 0 get $moving]
        assert_equal {1 2} [list [R 0 incr $other] [R 0 eval {return redis.call('incr', KEYS[1])} 1 $other]]
        assert_equal 7 [R 0 eval {return 7} 0]
        R 0 multi
        R 0 incr $other
        R 0 get $other
        assert_equal {3 3} [R 0 exec]
        assert_equal {1 1} [list [client_waits 0 $id_first] [client_waits 0 $id_second]]
        R 0 client kill id $id_second
        wait_for_condition 500 10 {[R 0 client list id $id_second] eq ""} else {fail "it stays"}
        assert_equal {1 snapshot} [list [client_waits 0 $id_first] [job_field 0 $id state]]
        finish $id
        # What was answered is there; from some write on all were sent to the target.
        set made 0
        set moved 0
        for {set i 0} {$i < 40} {incr i} {
            if {[catch {$first read} reply]} {
                assert_match "MOVED 10 *:[node_port 2]" $reply
                incr moved
            } else {
                assert_equal 0 $moved
                assert_equal [incr made] $reply
            }
        }
        assert_equal $made [R 2 llen [key_in 10 list]]
        assert_equal 0 [R 2 exists $moving]
        foreach rd [list $first $second] {$rd close}
        R 0 config set cluster-slot-migration-buffer-limit 1gb
    }

    # ---- pauses ----

    foreach {phase point node state} $::phases {
        foreach {n name} {0 source 2 target} {
            test "CLIENT PAUSE and UNPAUSE at the $name $phase hold and let go what they should" {
                fresh
                R 0 mset $moving 1
                R 2 set [key_in 14000 own] 1
                set id [job_at $point $node $state]
                R $n client pause 1000000 write
                set own [expr {$n ? [key_in 14000 own] : $other}]
                set paused [open_client $n]
                set paused_id [id_of $paused]
                $paused incr $own
                wait_client_waits $n $paused_id
                # Reads go on, those of the moving slots too.
                assert_equal [expr {$n ? 1 : ""}] [R $n get $own]
                assert_equal 1 [R 0 get $moving]
                # The pause of the operator does not end by a job's end, nor the job by the pause.
                finish $id
                assert_equal 1 [client_waits $n $paused_id]
                assert_equal 1 [R 2 get $moving]
                R $n client unpause
                assert_equal [expr {$n ? 2 : 1}] [$paused read]
                assert_equal 2 [R 2 incr $moving]
                $paused close
            }
        }
    }

    test "CLIENT UNPAUSE does not lift the fence" {
        fresh
        R 0 set $moving 1
        set id [job_at target_before_prepared 2 preparing]
        wait_job_state 0 $id fenced
        set rd [open_client 0]
        set waiter [id_of $rd]
        $rd incr $moving
        wait_client_waits 0 $waiter
        R 0 client pause 1000000 write
        R 0 client unpause
        # Not even this client's own commands go on in a pause of all: it ends by itself.
        R 0 client pause 50 all
        # Woken, looked at, and made to wait again.
        assert_equal 1 [R 0 get $moving]
        wait_client_waits 0 $waiter
        assert_equal fenced [job_field 0 $id state]
        finish $id
        catch {$rd read} error
        assert_match "MOVED 10 *:[node_port 2]" $error
        assert_equal 1 [job_field 0 $id attempt]
        assert_equal 1 [R 2 get $moving]
        $rd close
    }

    # ---- pipelines and transactions across the hand-off ----

    test "1000 commands in a pipeline over the hand-off are each executed once or answered MOVED, in order" {
        fresh
        set id [job_at source_before_commit 0 prepared]
        wait_job_state 0 $id fenced
        set rd [open_client 0]
        set waiter [id_of $rd]
        for {set i 0} {$i < 1000} {incr i} {
            # Three in turn: of a moving slot, a read of one, of another slot.
            switch [expr {$i%3}] {
                0 {$rd rpush [key_in 10 list] $i}
                1 {$rd llen [key_in 10 list]}
                2 {$rd rpush [key_in 4000 list] $i}
            }
        }
        wait_client_waits 0 $waiter
        finish $id
        for {set i 0} {$i < 1000} {incr i} {
            catch {$rd read} reply
            if {$i%3 == 2} {
                lappend done $i
                assert_equal [llength $done] $reply
            } else {
                assert_match "MOVED 10 *:[node_port 2]" $reply
            }
        }
        assert_equal $done [R 0 lrange [key_in 4000 list] 0 -1]
        assert_equal 0 [R 2 exists [key_in 10 list]]
        $rd close
    }

    test "Pipelines that run while slots are handed off: what was answered is there, once, and nothing else" {
        fresh
        for {set round 0} {$round < 5} {incr round} {
            R 0 flushall
            set id [half_moved]
            set rd [open_client 0]
            set sent 0
            set replies {}
            # Writes on and on, until some are answered by MOVED.
            failpoint 0 source_before_cut off
            while 1 {
                for {set i 0} {$i < 1000} {incr i} {$rd rpush [key_in 10 list] [incr sent]}
                for {set i 0} {$i < 1000} {incr i} {
                    catch {$rd read} reply
                    lappend replies $reply
                }
                if {[string match MOVED* $reply]} break
            }
            $rd close
            wait_migrated 0 2 $id
            set made {}
            set moved 0
            set at 0
            foreach reply $replies {
                incr at
                if {[string match "MOVED 10 *:[node_port 2]" $reply]} {
                    set moved 1
                } else {
                    # Once refused, always refused.
                    assert_equal 0 $moved
                    lappend made $at
                    assert_equal [llength $made] $reply
                }
            }
            assert_equal $made [R 2 lrange [key_in 10 list] 0 -1]
            assert_equal 1 [job_field 0 $id attempt]
            move_slots 2 0 10 12
        }
    }

    test "Transactions and scripts of several keys are never seen half, at no node and at no time of the hand-off" {
        fresh
        set names {a b c d e}
        foreach name $names {lappend keys [key_in 10 $name]; R 0 set [key_in 10 $name] 0}
        set script "for _, k in ipairs(KEYS) do redis.call('incr', k) end return redis.call('mget', unpack(KEYS))"
        for {set round 0} {$round < 5} {incr round} {
            set id [half_moved]
            set transactions [open_client 0]
            set scripts [open_client 0]
            set readers [list [open_client 0] [open_client 2]]
            failpoint 0 source_before_cut off
            set moved 0
            for {set more 3} {$more} {incr more -$moved} {
                for {set i 0} {$i < 100} {incr i} {
                    $transactions multi
                    foreach key $keys {$transactions incr $key}
                    $transactions exec
                    $scripts eval $script [llength $keys] {*}$keys
                    foreach rd $readers {$rd mget {*}$keys}
                }
                for {set i 0} {$i < 100} {incr i} {
                    $transactions read
                    foreach key $keys {catch {$transactions read} reply}
                    foreach rd [list $transactions $scripts {*}$readers] {
                        if {[catch {$rd read} reply]} {
                            # EXECABORT: its commands were redirected when they were queued.
                            assert {[string match "MOVED 10 *" $reply] || ($rd eq $transactions && [string match EXECABORT* $reply])}
                            if {$rd eq $scripts} {set moved 1}
                        } else {
                            assert_equal 1 [llength [lsort -unique $reply]] $reply
                        }
                    }
                }
            }
            wait_migrated 0 2 $id
            assert_equal 1 [llength [lsort -unique [R 2 mget {*}$keys]]]
            foreach rd [list $transactions $scripts {*}$readers] {$rd close}
            move_slots 2 0 10 12
        }
        # As many as were answered: each transaction and script once.
        assert_morethan [R 0 get [lindex $keys 0]] 0
    }

    # ---- flags of a connection ----

    test "READONLY and ASKING open no way to keys on their way, nor back to those that went" {
        fresh
        R 0 set $moving 1
        set target [connect 2]
        set source [connect 0]
        $target readonly
        $source readonly
        set id [half_moved]
        assert_error "MOVED 10 *:[node_port 0]" {$target get $moving}
        assert_equal OK [$target asking]
        assert_error "MOVED 10 *:[node_port 0]" {$target get $moving}
        assert_equal OK [$target asking]
        assert_error "MOVED 10 *:[node_port 0]" {$target set $moving 2}
        assert_equal 1 [$source get $moving]
        failpoint 0 source_before_trim pause
        failpoint 0 source_before_cut off
        wait_job_state 0 $id trimming
        # The keys are still in the source's memory here.
        assert_equal 1 [R 0 dbsize]
        foreach command [list [list get $moving] [list set $moving 2] [list exists $moving]] {
            assert_error "MOVED 10 *:[node_port 2]" {$source {*}$command}
            assert_equal OK [$source asking]
            assert_error "MOVED 10 *:[node_port 2]" {$source {*}$command}
        }
        assert_equal 1 [$target get $moving]
        finish $id
        $target close
        $source close
    }
}
