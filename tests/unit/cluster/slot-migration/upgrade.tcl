# A rolling replacement of a Redis 8.0 cluster with this server and back, under load, with
# append-only files; what moves meanwhile, and what is refused and how. Masters are nodes
# 0 to 2 at first, nodes n and n+3 are a shard.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

proc wait_link {n} {
    wait_for_condition 2000 10 {[status [Rn $n] role] eq "slave" && [status [Rn $n] master_link_status] eq "up"} else {
        fail "node $n: [R $n info replication]"
    }
}

proc wait_in_step {n} {
    wait_link $n
    wait_for_condition 2000 10 {[status [Rn $n] master_repl_offset] >= [status [Rn [shard_mate $n]] master_repl_offset]-100000} else {
        fail "node $n lags"
    }
}

# As an operator does it: first the replica, then a failover to it, then the old master.
proc replace_shard {shard which} {
    set master [shard_master $shard]
    set replica [shard_mate $master]
    restart_as $replica $which
    wait_in_step $replica
    half_replaced $shard $which $master $replica
    # One that takes too long is given up by the nodes, without a word.
    for {set try 1} {[status [Rn $replica] role] ne "master" && $try <= 5} {incr try} {
        R $replica cluster failover
        catch {wait_for_condition 1000 10 {[status [Rn $replica] role] eq "master"} else {fail "not yet"}}
    }
    wait_promoted $replica
    wait_link $master
    restart_as $master $which
    wait_in_step $master
    wait_agreed
}

proc wait_agreed {} {
    wait_for_condition 2000 10 {[agreed]} else {fail "the nodes do not agree: [R 0 cluster nodes]"}
}

proc agreed {} {
    for {set n 0} {$n < 6} {incr n} {
        if {[getInfoProperty [R $n cluster info] cluster_state] ne "ok"} {return 0}
        lappend views [lsort [lmap node [R $n cluster slots] {list [lindex $node 0] [lindex $node 1] [lindex $node 2 2]}]]
    }
    expr {[llength [lsort -unique $views]] == 1}
}

proc master_id {shard} {node_id [shard_master $shard]}

proc try {from args} {
    set code [catch {R $from cluster migrate-slots {*}$args} reply]
    list $code $reply
}

# One end or a replica of one end is unpatched, in either direction: the word is said by name.
proc half_replaced {shard which master replica} {
    set other [shard_master [expr {($shard+1)%3}]]
    if {$which ne "vanilla" || $::runs($other) ne "ours"} return
    set slot [lindex [owned $other] 0]
    assert_match "1 *the target [node_id $master]*refuses*has a replica at *runs a server which cannot take part in slot migrations: upgrade or detach it*" \
        [join [try $other slotsrange $slot $slot node [node_id $master]]]
    set slot [lindex [owned $master] 0]
    assert_match "1 *has a replica at *runs a server which cannot take part in slot migrations: upgrade or detach it*" \
        [join [try $master slotsrange $slot $slot node [node_id $other]]]
}

proc owned {n} {
    set slots {}
    foreach slot $::slots {
        if {[slot_owner $n $slot] == $n} {lappend slots $slot}
    }
    return $slots
}

# Moves one of the shard's slots to the next one and back, if both run this server.
proc move_what_can {} {
    foreach shard {0 1 2} {
        set from [shard_master $shard]
        set to [shard_master [expr {($shard+1)%3}]]
        set slot [lindex [owned $from] 0]
        if {$::runs($from) eq "vanilla"} {
            assert_match "1 *unknown subcommand*" [join [try $from slotsrange $slot $slot node [node_id $to]]]
        } elseif {$::runs($to) eq "vanilla"} {
            assert_match "1 *runs a server that cannot take slots this way: upgrade it*" [join [try $from slotsrange $slot $slot node [node_id $to]]]
        } else {
            foreach {a b} [list $from $to $to $from] {
                set id [migrate $a $b $slot $slot]
                wait_job_state $a $id done
                wait_agreed
            }
            incr ::moved
        }
    }
}

set ::slots {0 1 2 3 6000 6001 6002 6003 12000 12001 12002 12003}

start_cluster 3 3 {tags {external:skip cluster} overrides {appendonly yes save "" repl-diskless-sync-delay 0}} {
    wait_replicas_up
    for {set n 0} {$n < 6} {incr n} {set ::runs($n) ours}
    foreach shard {0 1 2} {fill_strings $shard [lrange $::slots [expr {$shard*4}] [expr {$shard*4+3}]] 2000}
    set keys [expr {[R 0 dbsize]+[R 1 dbsize]+[R 2 dbsize]}]
    set writers [start_writers 3 $::slots -1]
    wait_writers_go_on $writers

    foreach {which at_the_end} {vanilla 0 ours 3} {
        test "Shard by shard the cluster is replaced by [expr {$which eq {ours} ? {this server} : {Redis 8.0}}], under load: slots move where both ends can" {
            set ::moved 0
            move_what_can
            foreach shard {0 1 2} {
                replace_shard $shard $which
                move_what_can
                wait_writers_go_on $writers
            }
            set ::moved 0
            move_what_can
            assert_equal $at_the_end $::moved
            for {set n 0} {$n < 6} {incr n} {assert_equal $which $::runs($n)}
            # Files of the one are read by the other, at every node.
            for {set n 0} {$n < 6} {incr n} {
                if {[status [Rn $n] role] ne "slave"} continue
                restart_as $n $which
                wait_in_step $n
            }
        }
    }

    test "The target's shard becomes one of Redis 8.0 in the middle of a job: the source says so, and serves on" {
        set from [shard_master 0]
        set to [shard_master 1]
        set slot [lindex [owned $from] 0]
        set id [lindex [R $from cluster migrate-slots slotsrange $slot $slot node [node_id $to] hold] 0]
        wait_job_state $from $id streaming
        replace_shard 1 vanilla
        wait_job_ended $from $id
        assert_match "*has a replica at *runs a server which cannot take part in slot migrations: upgrade or detach it*" \
            [job_field $from $id last-error]
        wait_writers_go_on $writers
        assert_equal $from [slot_owner $from $slot]
        replace_shard 1 ours
        set id [migrate $from [shard_master 1] $slot $slot]
        wait_job_state $from $id done
        wait_agreed
    }

    test "Nothing was lost" {
        stop_writers $writers
        assert_equal 0 [llength [lsearch -all -inline [lmap shard {0 1 2} {R [shard_master $shard] dbsize}] 0]]
        foreach shard {0 1 2} {
            wait_shard_in_step [shard_master $shard]
            wait_shard_agrees [shard_master $shard] {}
        }
        set count 0
        foreach shard {0 1 2} {incr count [llength [lsearch -all -not [R [shard_master $shard] keys *] *writer*]]}
        assert_equal $keys $count
    }
}
