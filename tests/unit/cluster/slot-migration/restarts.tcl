# Either node of a migration dies in any phase and comes back with its nodes.conf and what
# its persistence has kept: nothing, an RDB of before the migration, or the append-only
# file. The migration goes on by itself. The slots have one owner; what is lost is what the
# node that died served and did not keep; meanwhile both nodes say what they wait for.
# (Nodes that have replicas: resume-failover.tcl.)
#
# SLOTMIG_MATRIX=all runs all rows, else each phase and side has a turn with one kind of
# persistence.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

set ::slots {5 6 7 8 9 10 11 12}
set ::all_rows [expr {[info exists ::env(SLOTMIG_MATRIX)] && $::env(SLOTMIG_MATRIX) eq "all"}]

# A phase, the fail point that holds it and where, the states of source and target in it.
set ::held_by {
    loading   target_before_section  2 snapshot  loading
    following source_before_cut      0 streaming following
    prepared  source_before_commit   0 fenced    prepared
    committed target_before_takeover 2 committed prepared
    taken     target_after_takeover  2 committed taken
    trimming  source_before_trim     0 trimming  done
}

# What the node that lives says while the other one is gone, and then this one, restarted,
# while it hears nothing from the other: state and reason, -: it knows no such job.
set ::says {
    source loading   "connecting the link to the source is lost: *" "waiting this node was restarted"
    source following "connecting the link to the source is lost: *" "waiting this node was restarted"
    source prepared  "prepared prepared; asking the source whether it committed: *" "inherited this node was restarted"
    source committed "prepared prepared; asking the source whether it committed: *" "inherited this node was restarted"
    source taken     "taken taken; the link to the source is lost: *" "inherited this node was restarted"
    source trimming  "done " -
    target loading   "waiting the link to the target is lost (*): it has to come again" -
    target following "waiting the link to the target is lost (*): it has to come again" -
    target prepared  "waiting the link to the target is lost (*): it has to come again" -
    target committed "committed committed; asking the target whether it took over: *" -
    target taken     "committed committed; asking the target whether it took over: *" -
    target trimming  "trimming " -
}

proc said {n id} {
    if {[catch {job $n $id} job]} {return -}
    return "[dict get $job state] [dict get $job reason][dict get $job last-error]"
}

proc wait_says {n id pattern} {
    wait_for_condition 1000 10 {[string match $pattern [said $n $id]]} else {fail "node $n says '[said $n $id]', expected '$pattern'"}
}

proc own_key {n} {
    key_in [expr {$n*5461+20}] own
}

proc fill {} {
    fill_strings 0 $::slots 400 100
    foreach n {0 1 2} {R $n set [own_key $n] $n}
    slots_dump 0 $::slots
}

# Start the migration and hold it in the phase; its id.
proc hold {phase} {
    foreach {name point at from to} $::held_by {if {$name eq $phase} break}
    failpoint $at $point pause
    set id [migrate 0 2 5 12]
    wait_job_state 0 $id $from
    wait_job_state 2 $id $to
    return $id
}

# Does the owner have the moving keys in the end? The source has its copy, or still loads it,
# until the target says that it has taken over; from then on they are the target's only.
proc keys_stay {persistence side phase} {
    if {$persistence eq "aof"} {return 1}
    if {$side eq "target"} {return [expr {$phase ne "trimming"}]}
    expr {$persistence eq "rdb" || $phase in {taken trimming}}
}

# Interruptions at source and target, - where the job is not known any more.
proc interruptions {persistence side phase} {
    if {$side eq "source"} {
        return [dict get {loading {1 1} following {1 1} prepared {1 1} committed {1 1} taken {0 0} trimming {- 0}} $phase]
    }
    # What it loads from its append-only file it has taken over for good.
    if {$phase eq "trimming" || ($phase eq "taken" && $persistence eq "aof")} {return {0 -}}
    return {1 0}
}

proc run_row {persistence side phase} {
    fresh
    set before [fill]
    lassign [expr {$side eq "source" ? {0 2} : {2 0}}] n other
    if {$persistence eq "rdb"} {R $n save}
    set id [hold $phase]
    foreach {row_side row_phase meanwhile restarted} $::says {if {$row_side eq $side && $row_phase eq $phase} break}
    set_node_timeouts 60000     ;# the one that stands still is not missed
    kill_node $n
    wait_says $other $id $meanwhile
    pause_process [node_pid $other]
    start_node_again $n
    wait_says $n $id $restarted
    resume_process [node_pid $other]
    failpoints_off $other
    foreach m {0 2} known [interruptions $persistence $side $phase] {
        if {$known eq "-"} {
            assert_equal - [said $m $id]
        } else {
            wait_job_state $m $id done
            if {$known} {assert_morethan_equal [job_field $m $id interruptions] $known} else {assert_equal 0 [job_field $m $id interruptions]}
        }
    }
    set_node_timeouts 3000
    assert_equal 2 [assert_one_owner $::slots [expr {[keys_stay $persistence $side $phase] ? $before : {}}] {"" "" ""}]
    foreach m {0 1 2} {
        assert_equal [expr {$m == $n && $persistence eq "none" ? "" : $m}] [R $m get [own_key $m]] "own key of node $m"
    }
}

foreach {::persistence ::settings} {none {} rdb {} aof {appendonly yes appendfsync always}} {
    start_cluster 3 0 [list tags {external:skip cluster} overrides [concat {save "" repl-diskless-load disabled} $::settings]] {
        set turn 0
        foreach phase {loading following prepared committed taken trimming} {
            foreach side {source target} {
                set its [lindex {none rdb rdb aof aof none} $turn]
                set turn [expr {($turn+1)%6}]
                if {!$::all_rows && $its ne $::persistence} continue
                test "The $side dies while a job is $phase and comes back with [dict get {none nothing rdb {its RDB} aof {its append-only file}} $::persistence]" {
                    run_row $::persistence $side $phase
                }
            }
        }

        # Writes that it acknowledged behind the save may be missing: nobody knows.
        if {$::persistence eq "rdb"} {
            test "A target that dies before it has told of the take-over and loads keys of the slots from an RDB: an operator decides" {
                fresh
                set before [fill]
                set id [hold taken]
                R 2 save
                set_node_timeouts 60000
                kill_node 2
                start_node_again 2
                wait_says 0 $id "committed the target was restarted, owns the slots and has keys in them, while*: CLUSTER CANCEL-SLOT-MIGRATIONS ID $id FORCE takes the slots back"
                assert_error "*is committed*" {R 0 cluster cancel-slot-migrations id $id}
                assert_equal 1 [R 0 cluster cancel-slot-migrations id $id force]
                wait_job_state 0 $id failed
                assert_equal "the target did not take over: taken back by force" [job_field 0 $id last-error]
                set_node_timeouts 3000
                assert_equal 0 [assert_one_owner $::slots $before {"" "" ""}]
                foreach m {0 1 2} {assert_equal $m [R $m get [own_key $m]]}
            }
        }
    }
}
