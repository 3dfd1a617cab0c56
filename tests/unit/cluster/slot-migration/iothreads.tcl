# Clients that I/O threads serve, many and with pipelines, at both ends of a move.

source tests/support/slot_migration.tcl

start_cluster 2 0 {tags {external:skip cluster} overrides {io-threads 4 cluster-slot-migration-timeout 0}} {
    test "Moves back and forth between nodes whose I/O threads are busy lose and repeat no write" {
        fresh
        set slots [slots_of {0 19}]
        fill_strings 0 $slots 10000 100
        foreach slot {1 2} {fill_all_types 0 $slot}
        set before [slots_dump 0 $slots]
        foreach n {0 1} {R $n config resetstat}
        set writers [start_writers 2 {3 15 100 12000}]
        set pipeliners [start_pipeliners 2 {0 1} {3 4 19 100 12000}]
        wait_writers_go_on $writers
        for {set i 0} {$i < 12} {incr i} {
            if {$i % 2} {move_slots 1 0 0 19} else {move_slots 0 1 0 19}
            wait_writers_go_on $writers 10
        }
        set seen [stop_writers $writers]
        assert_equal {} [dict get $seen errors]
        foreach what {ask tryagain twice} {assert_equal 0 [dict get $seen $what] $what}
        set seen [stop_pipeliners $pipeliners]
        assert_morethan [dict get $seen acked] 1000
        assert_morethan [dict get $seen moved] 1000
        # It was I/O threads that read and wrote.
        foreach n {0 1} {
            assert_morethan [status [Rn $n] io_threaded_reads_processed] 1000
            assert_morethan [status [Rn $n] io_threaded_writes_processed] 1000
        }
        set after [slots_dump 0 $slots]
        foreach key [dict keys $after] {
            if {[string match *writer:* $key] || [string match *pipe:* $key]} {dict unset after $key}
        }
        assert_same_dump $before $after
    }

    test "Jobs that end in every way leave I/O threads' clients and the nodes as they were" {
        fresh
        set slots [slots_of {0 19}]
        fill_strings 0 $slots 5000 100
        set pipeliners [start_pipeliners 2 {0 1} {3 4 19 100 12000}]
        foreach {n point} {0 source_before_attach 0 source_in_child 1 target_before_section 0 source_before_commit 1 target_before_takeover} {
            failpoint $n $point [expr {$point eq "source_before_commit" ? "pause" : "fail"}]
            set id [migrate 0 1 0 19]
            if {$point eq "source_before_commit"} {
                wait_job_state 1 $id prepared
                R 0 cluster cancel-slot-migrations id $id
            }
            wait_for_condition 1500 10 {[jobs_running 0] + [jobs_running 1] == 0} else {fail "a job goes on: [job 0 $id]"}
            failpoint $n $point off
            assert {[job_field 0 $id state] in {failed cancelled}}
            assert_equal 0 [slot_owner 0 3]
        }
        move_slots 0 1 0 19
        set seen [stop_pipeliners $pipeliners]
        assert_morethan [dict get $seen acked] 1000
        assert_equal 0 [R 0 cluster countkeysinslot 3]
    }
}
