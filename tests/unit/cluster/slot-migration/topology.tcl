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
        test "BUMPEPOCH at $who costs a job at most an attempt or ends it with the reason, in every phase" {
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
}
