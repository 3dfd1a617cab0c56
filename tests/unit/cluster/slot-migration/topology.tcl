# Everything that operators do to the cluster's topology, at both nodes of a job and
# at others, in each of its phases. Whatever it is: a clear answer, no node dies, both
# ends end with a state and a true reason, and each slot has one owner with all keys.

source tests/support/slot_migration.tcl

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
                fill_moving 0
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
        test "BUMPEPOCH at $who costs a job at most an attempt, in every phase" {
            foreach phase [phases_of [expr {$n == 2 ? "target" : "source"}]] {
                home
                fill_moving 0
                set before [slots_dump 0 {5 6 7}]
                set pids [node_pids]
                # Somebody else has got the highest epoch.
                R [expr {$n == 1 ? 3 : 1}] cluster bumpepoch
                wait_cluster_agrees
                set id [hold_in_phase $phase 0 2 5 7]
                set answer [R $n cluster bumpepoch]
                # A target that took over has got the highest epoch.
                if {$phase ne "trimming" || $n != 2} {assert_match {BUMPED *} $answer}
                # With a higher epoch than the target's it must not claim what it has committed.
                if {$n == 0} {assert_equal [expr {$phase ni {committed trimming}}] [claims 0 5 7] $phase}
                let_go $phase 0 2
                assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]] $phase
                assert_equal 2 [assert_one_owner {5 6 7} $before $pids] $phase
            }
        }
    }

    # ---- many jobs at once ----

    # Send all requests "from to first last" at the same time, and wait until all slots have moved.
    proc move_all {requests} {
        set sent {}
        foreach request $requests {
            lassign $request from to first last
            lappend sent [send_command $from cluster migrate-slots slotsrange $first $last node [node_id $to]]
        }
        set jobs {}
        foreach request $requests rd $sent {
            lappend jobs [lindex $request 0] [$rd read]
            $rd close
        }
        foreach {n id} $jobs {assert_equal done [wait_job_ended $n $id] [job_field $n $id last-error]}
        wait_cluster_agrees
    }

    foreach {what requests} {
        "PEERS 15: opposite jobs" {{0 2 5 7} {2 0 16000 16002}}
        "Jobs in a circle of three nodes" {{0 1 5 7} {1 2 6000 6002} {2 0 16000 16002}}
        "Jobs in both directions of a circle" {{0 1 5 5} {1 2 6000 6000} {2 0 16000 16000} {1 0 6001 6001} {2 1 16001 16001} {0 2 6 6}}
        "Jobs from and to everybody" {{0 1 0 10} {0 2 11 20} {0 3 21 30} {1 3 5461 5470} {2 3 10923 10930} {1 0 6000 6010} {2 1 16373 16383}}
    } {
        test "$what at the same time: nobody is refused, nobody stalls, no write is lost" {
            home
            set slots {}
            foreach request $requests {
                lassign $request from to first last
                for {set j $first} {$j <= $last} {incr j} {lappend slots $j}
                fill_strings $from [list $first $last] 20
                dict set where $first $to
                dict set where $last $to
            }
            set dump {}
            foreach n {0 1 2} {set dump [dict merge $dump [slots_dump $n $slots]]}
            set pids [node_pids]
            set writers [start_writers 2 [list [lindex $slots 0] [lindex $slots end]]]
            wait_writers_go_on $writers 20
            move_all $requests
            wait_writers_go_on $writers 20
            set seen [stop_writers $writers]
            assert_equal {} [dict get $seen errors]
            assert_equal 0 [expr {[dict get $seen ask]+[dict get $seen tryagain]}]
            foreach request $requests {
                lassign $request from to first last
                assert_equal 1 [claims $to $first $last]
                for {set j $first} {$j <= $last} {incr j} {R $to del [key_in $j writer:0:list] [key_in $j writer:0:counter] [key_in $j writer:1:list] [key_in $j writer:1:counter]}
                foreach n {0 1 2 3} {if {$n != $to} {assert_equal {} [keys_in_slots $n [slots_of [list $first $last]]]}}
            }
            set after {}
            foreach n {0 1 2 3} {set after [dict merge $after [slots_dump $n $slots]]}
            assert_same_dump $dump $after
            foreach pid $pids {assert {[is_alive $pid]}}
            unset where
        }
    }

    test "PEERS 13: adjacent ranges move as one job or as several, overlapping requests are refused by the slot" {
        home
        fill_strings 0 [slots_of {0 30}] 310
        set before [slots_dump 0 [slots_of {0 30}]]
        set pids [node_pids]
        # In one block, next to each other and in no order.
        set id [migrate 0 2 11 20 0 10]
        wait_migrated 0 2 $id
        foreach n {0 2} {assert_equal 0-20 [job_field $n $id slots]}
        # In jobs next to each other, held in the same phase.
        failpoint 0 source_before_cut pause
        set first [migrate 0 2 21 24]
        set second [migrate 0 2 25 27]
        set third [migrate 0 1 28 30]
        foreach id [list $first $second $third] {wait_job_state 0 $id streaming}
        foreach {range id} [list {24 25} $first {24 24} $first {25 25} $second {20 30} "" {27 31} $second {30 40} $third] {
            assert_match "*slot [expr {$id eq "" ? 20 : "*"}] is *[expr {$id eq "" ? "served by" : "in slot migration $id already"}]*" \
                [answer 0 cluster migrate-slots slotsrange {*}$range node [node_id 1]]
        }
        failpoint 0 source_before_cut off
        foreach {id to} [list $first 2 $second 2 $third 1] {wait_migrated 0 $to $id}
        foreach {first last to} {0 27 2 28 30 1} {assert_equal 1 [claims $to $first $last]}
        assert_same_dump $before [dict merge [slots_dump 2 [slots_of {0 27}]] [slots_dump 1 {28 29 30}]]
        assert_equal 0 [R 0 dbsize]
        # All back in one request that takes two jobs' slots.
        move_slots 2 0 0 27
        move_slots 1 0 28 30
        assert_equal 0 [assert_one_owner [slots_of {0 30}] $before $pids]
    }

    test "PEERS 36: slot 0 and slot 16383 move alone, with their neighbours and together, and only they" {
        home
        set slots {0 1 16382 16383}
        fill_strings 0 {0 1} 40
        fill_strings 2 {16382 16383} 40
        set before [dict merge [slots_dump 0 {0 1}] [slots_dump 2 {16382 16383}]]
        move_slots 0 1 0 0
        assert_equal {1 0} [list [slot_owner 0 0] [slot_owner 0 1]]
        assert_equal 20 [R 1 dbsize]
        move_slots 2 1 16383 16383
        assert_equal {2 1} [list [slot_owner 0 16382] [slot_owner 0 16383]]
        assert_equal 40 [R 1 dbsize]
        # Both ends of all slots in one job.
        set id [move_slots 1 3 0 0 16383 16383]
        assert_equal "0 16383" [job_field 3 $id slots]
        assert_equal {0 40} [list [R 1 dbsize] [R 3 dbsize]]
        move_slots 0 3 1 1
        move_slots 2 3 16382 16382
        assert_same_dump $before [slots_dump 3 $slots]
        assert_equal {0 0} [list [R 0 dbsize] [R 2 dbsize]]
        assert_equal {{0 1} {16382 16383}} [lmap range [dict get [cluster_get_myself 3] slots] {split $range -}]
    }

    foreach allowed {no yes} {
        test "A source that loses its last slots [expr {$allowed ? "becomes a replica of the target" : "stays a master"}], and a target without slots gets some" {
            home
            fill_moving 0
            # A source of only these.
            move_slots 0 3 5 7
            assert_equal 5-7 [dict get [cluster_get_myself 3] slots]
            set before [slots_dump 3 {5 6 7}]
            set pids [node_pids]
            foreach n {0 1 2 3} {R $n config set cluster-allow-replica-migration $allowed}
            set writers [start_writers 1 {6}]
            wait_writers_go_on $writers 20
            set id [migrate 3 2 5 7]
            assert_equal {done done} [list [wait_job_ended 3 $id] [wait_job_ended 2 $id]]
            wait_writers_go_on $writers 20
            assert_equal {} [dict get [stop_writers $writers] errors]
            R 2 del [key_in 6 writer:0:list] [key_in 6 writer:0:counter]
            wait_cluster_agrees
            assert_equal "" [dict get [cluster_get_myself 3] slots]
            assert_same_dump $before [slots_dump 2 {5 6 7}]
            if {$allowed} {
                assert_equal [node_id 2] [dict get [cluster_get_myself 3] slaveof]
                wait_for_condition 1000 20 {[status [Rn 3] master_link_status] eq "up"} else {fail "no replica: [R 3 info replication]"}
                wait_for_condition 500 10 {[R 3 dbsize] == [R 2 dbsize]} else {fail "[R 3 dbsize] of [R 2 dbsize] keys"}
            } else {
                assert_equal master [status [Rn 3] role]
                assert_equal 0 [R 3 dbsize]
                move_slots 2 3 5 7
                assert_equal 3 [assert_one_owner {5 6 7} $before $pids]
            }
        }
    }
}
