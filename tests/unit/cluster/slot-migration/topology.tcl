# Everything that operators do to the cluster's topology, at both nodes of a job and
# at others, in each of its phases. Whatever it is: a clear answer, no node dies, both
# ends end with a state and a true reason, and each slot has one owner with all keys.

source tests/support/slot_migration.tcl

# What each test starts with, whatever the one before it left of the cluster. Node 3
# is a master without slots.
proc home {} {
    for {set n 0} {$n < 4} {incr n} {
        if {[is_alive [node_pid $n]]} {exec kill -CONT [node_pid $n]} else {start_node_again $n}
        R $n config set cluster-node-timeout 3000
        R $n config set cluster-allow-replica-migration no
        R $n config set cluster-require-full-coverage yes
        failpoints_off $n
        if {[status [Rn $n] role] eq "slave"} {R $n cluster reset soft}
        R $n cluster cancel-slot-migrations all
    }
    for {set n 0} {$n < 4} {incr n} {
        wait_for_condition 1500 10 {[jobs_running $n] == 0} else {
            fail "node $n has jobs that do not end: [R $n cluster slot-migrations]"
        }
        foreach {- slot} [regexp -all -inline {\[(\d+)-[<>]-} [R $n cluster nodes]] {R $n cluster setslot $slot stable}
    }
    flush_all_nodes
    if {![all_know_all]} {make_cluster}
    set homes {0 5460 5461 10922 10923 16383 16384 16383}
    for {set n 0} {$n < 4} {incr n} {
        foreach range [dict get [cluster_get_myself $n] slots] {
            lassign [split $range -] first last
            for {set j $first} {$j <= ($last eq "" ? $first : $last)} {incr j} {set claimed($j) $n}
        }
    }
    for {set n 0} {$n < 4} {incr n} {
        set rd [redis_deferring_client -$n]
        set mine 0
        for {set j [lindex $homes [expr {2*$n}]]} {$j <= [lindex $homes [expr {2*$n+1}]]} {incr j} {
            if {[info exists claimed($j)]} continue
            $rd cluster setslot $j node [node_id $n]
            incr mine
        }
        for {set j 0} {$j < $mine} {incr j} {assert_equal OK [$rd read]}
        $rd close
        if {$mine} {R $n cluster bumpepoch}
    }
    wait_cluster_agrees
    for {set n 0} {$n < 4} {incr n} {
        for {set to 0} {$to < 3} {incr to} {
            if {$to == $n} continue
            set ranges {}
            foreach range [dict get [cluster_get_myself $n] slots] {
                lassign [split $range -] first last
                set first [expr {max($first,[lindex $homes [expr {2*$to}]])}]
                set last [expr {min($last eq "" ? $first : $last,[lindex $homes [expr {2*$to+1}]])}]
                if {$first <= $last} {lappend ranges $first $last}
            }
            if {$ranges ne ""} {move_slots $n $to {*}$ranges}
        }
    }
    for {set n 0} {$n < 4} {incr n} {
        wait_for_condition 500 10 {[node_children $n] eq ""} else {fail "node $n has a child: [node_children $n]"}
    }
}

# The empty nodes, as they were when they were new. (FORGET works on for a minute.)
proc make_cluster {} {
    for {set n 0} {$n < 4} {incr n} {R $n cluster reset soft}
    foreach {n first last} {0 0 5460 1 5461 10922 2 10923 16383} {
        R $n cluster addslotsrange $first $last
        R $n cluster bumpepoch
    }
    meet_again
}

# Does node n claim all slots of a range (1), or none (0)?
proc claims {n first last} {
    set mine {}
    foreach range [dict get [cluster_get_myself $n] slots] {
        lassign [split $range -] from to
        for {set j [expr {max($from,$first)}]} {$j <= min($to eq "" ? $from : $to,$last)} {incr j} {lappend mine $j}
    }
    if {[llength $mine] == 0} {return 0}
    expr {[llength $mine] == $last-$first+1 ? 1 : "$mine only"}
}

# What a command answered, errors as text.
proc answer {n args} {
    catch {R $n {*}$args} reply
    return $reply
}

# Keys in the slots that move, and one in each node that serves others.
proc fill {n} {
    fill_strings $n {5 6 7} 60
    [Rn $n] hset [key_in 6 hash] f v g w
    [Rn $n] hpexpire [key_in 6 hash] 100000000 fields 1 f
    [Rn $n] set [key_in 7 ttl] x ex 100000
}

# The phases in which node n of a job from node `from` to node `to` runs, but those
# in `but`.
proc phases_of {end {but {}}} {
    set phases {}
    foreach {phase at_source at_target point} $::phases_of_a_job {
        if {[expr {$end eq "source" ? $at_source : $at_target}] ne "-" && $phase ni $but} {lappend phases $phase}
    }
    return $phases
}

start_cluster 4 0 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {

    # ---- what is refused ----

    # What the command answers, the command. At both ends, in every phase that has a
    # job there.
    set refused {
        "*lot 6 is in slot migration JOB*" {setslot 6 migrating THIRD}
        "*lot 6 is in slot migration JOB*" {setslot 6 importing THIRD}
        "*lot 6 is in slot migration JOB*" {setslot 6 node THIRD}
        "*lot 6 is in slot migration JOB*" {setslot 6 node PEER}
        "*lot 6 is in slot migration JOB*" {setslot 6 node MYSELF}
        "*lot 6 is in slot migration JOB*" {setslot 6 stable}
        "*lot 6 is in slot migration JOB*" {delslots 4000 6}
        "*lot 5 is in slot migration JOB*" {delslotsrange 5 7}
        "*lot 7 is in slot migration JOB*" {addslots 7}
        "*lot 5 is in slot migration JOB*" {addslotsrange 5 7}
        "*already busy*"                   {addslots 6000}
        "*must be empty*"                  {flushslots}
        "*must be empty*"                  {replicate THIRD}
        "*must be empty*"                  {replicate PEER}
        "*containing keys*"                {reset}
        "*containing keys*"                {reset soft}
        "*containing keys*"                {reset hard}
        "*to a replica*"                   {failover}
        "*to a replica*"                   {failover force}
        "*to a replica*"                   {failover takeover}
        "*forget myself*"                  {forget MYSELF}
        "*does not know any other*"        {set-config-epoch 5}
        OK                                 {saveconfig}
        OK                                 {meet HOST PORT}
        OK                                 {setslot FREE migrating THIRD}
        OK                                 {setslot FREE stable}
        OK                                 {setslot 6001 importing THIRD}
        OK                                 {setslot 6001 stable}
    }
    foreach {end n peer free} {source 0 2 4000 target 2 0 16000} {
        foreach phase [phases_of $end] {
            test "While a job is $phase CLUSTER commands at its $end are refused or answered as ever, and it ends well" {
                home
                fill 0
                R 2 set [key_in 16000 own] x
                set before [slots_dump 0 {5 6 7}]
                set pids [node_pids]
                set third [node_id 1]
                set other [node_id $peer]
                set myself [node_id $n]
                set target [node_id 2]
                set id [hold_in_phase $phase 0 2 5 7]
                foreach {reply command} $refused {
                    # The target has ended its job in this phase, the slots are its own.
                    if {$phase eq "trimming" && $end eq "target" && [string match *JOB* $reply]} continue
                    set command [string map [list THIRD $third PEER $other MYSELF $myself FREE $free \
                        HOST [srv -1 host] PORT [srv -1 port]] $command]
                    set got [answer $n cluster {*}$command]
                    assert_match [string map [list JOB $id] $reply] $got "$command"
                }
                if {$end eq "source" && $phase ne "trimming"} {
                    assert_match "*lot 6 is in slot migration $id already*" [answer 0 cluster migrate-slots slotsrange 6 6 node $third]
                    assert_match "*lot 7 is in slot migration $id already*" [answer 0 cluster migrate-slots slotsrange 7 7 node $target]
                }
                let_go $phase 0 2
                assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
                assert_equal 2 [assert_one_owner {5 6 7} $before $pids]
            }
        }
    }

    # ---- BUMPEPOCH ----

    foreach {who n} {source 0 target 2 "a third node" 1} {
        test "BUMPEPOCH at $who costs a job at most an attempt or ends it with the reason, in every phase" {
            foreach phase [phases_of [expr {$n == 2 ? "target" : "source"}]] {
                home
                fill 0
                set before [slots_dump 0 {5 6 7}]
                set pids [node_pids]
                # Somebody else has got the highest epoch.
                R [expr {$n == 1 ? 3 : 1}] cluster bumpepoch
                wait_cluster_agrees
                set id [hold_in_phase $phase 0 2 5 7]
                set answer [R $n cluster bumpepoch]
                # A target that took over has got the highest epoch.
                if {$phase ne "trimming" || $n != 2} {assert_match {BUMPED *} $answer}
                let_go $phase 0 2
                set states [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
                set owner [assert_one_owner {5 6 7} $before $pids]
                if {$states ne {done done}} {
                    assert_equal {failed failed} $states $phase
                    foreach m {0 2} {assert_match "*slots changed in the middle*" [job_field $m $id last-error]}
                    assert_equal 0 $owner
                    move_slots 0 2 5 7
                    assert_equal 2 [assert_one_owner {5 6 7} $before $pids]
                } else {
                    assert_equal 2 $owner $phase
                }
            }
        }
    }

    # ---- FORGET ----

    # That a node was forgotten goes round, and is believed for a minute: what must be
    # true is looked at while they are apart.
    foreach {who n forgotten end} {
        source 0 2 source   target 2 0 target   "a third node" 1 0 target   "another node" 3 2 source
    } {
        foreach phase [phases_of $end] {
            # A third node's word comes when it comes; these it finds held.
            if {$n in {1 3} && $phase ni {streaming preparing prepared trimming}} continue
            test "PEERS 34: a [expr {$forgotten ? "target" : "source"}] that $who forgets while a job is $phase: every slot has one owner, with its keys" {
                home
                foreach m {0 1 2 3} {R $m config set cluster-require-full-coverage no}
                fill 0
                set before [slots_dump 0 {5 6 7}]
                set pids [node_pids]
                set name [node_id $forgotten]
                set other [expr {2-$forgotten}]
                set id [hold_in_phase $phase 0 2 5 7]
                assert_equal OK [R $n cluster forget $name]
                wait_for_condition 1500 10 {[string first $name [R $other cluster nodes]] < 0} else {fail "node $other does not hear of it"}
                # Past the commit, or bound by it, the two can only complete the job.
                set completes [expr {$phase in {committed trimming} || ($phase eq "prepared" && $forgotten == 0)}]
                if {$phase ni {offered committed bound trimming} && !$completes} {wait_job_ended $other $id}
                let_go $phase 0 2
                if {$phase eq "bound"} {
                    # It cannot ask the source any more, and says what to do.
                    wait_for_condition 1500 10 {[string match "*the source was forgotten*CLUSTER MEET*" [job_field 2 $id reason]]} else {fail "[job 2 $id]"}
                    wait_for_condition 1500 10 {[string match "*has not taken over yet*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
                    assert_equal {committed prepared} [list [job_field 0 $id state] [job_field 2 $id state]]
                    assert_equal 1 [R 2 cluster cancel-slot-migrations id $id force]
                    assert_equal {failed cancelled} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
                } elseif {$completes} {
                    assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
                } else {
                    assert_equal failed [wait_job_ended 0 $id]
                    # A target that refused, or never heard of it, has no job.
                    if {$phase ne "offered"} {assert_equal failed [wait_job_ended 2 $id]}
                    assert_match "*not known*" [job_field $other $id last-error]
                }
                foreach m {0 1 2 3} {
                    wait_for_condition 1500 10 {[jobs_running $m] == 0} else {fail "node $m goes on: [R $m cluster slot-migrations]"}
                }
                set owner [expr {$completes ? 2 : 0}]
                foreach m {0 1 2 3} {
                    # By what it claims itself.
                    assert_equal [expr {$m == $owner}] [claims $m 5 7] "node $m: [cluster_get_myself $m]"
                    if {$m != $owner} {assert_equal {} [keys_in_slots $m {5 6 7}]}
                    assert {[is_alive [lindex $pids $m]]}
                }
                assert_same_dump $before [slots_dump $owner {5 6 7}]
                assert_equal 1 [R $owner incr [key_in 5 probe]]
            }
        }
    }
}
