# What was interrupted goes on where it was: the two nodes lose their connections, in
# any phase; slots that arrived stay, the stream goes on at its offset, nothing is lost,
# nothing is applied twice.

source tests/support/slot_migration.tcl

set ::slots {5 6 7 8 9 10 11 12 13 14}

# The links break, and are there again.
proc cut_links {to id} {
    set before [job_field $to $id interruptions]
    failpoint $to target_cuts_links fail
    wait_for_condition 1000 10 {[job_field $to $id interruptions] > $before} else {fail "no interruption: [job $to $id]"}
}

start_cluster 4 0 {tags {external:skip cluster}} {

    foreach phase {snapshot streaming preparing} {
        test "Links lost while a job is $phase under writes: it goes on, nothing is lost, no slot comes twice" {
            home
            fill_moving 0
            set pids [node_pids]
            set writers [start_writers 2 {5 9 14}]
            wait_writers_go_on $writers 20
            set id [hold_in_phase $phase 0 2 5 14]
            wait_writers_go_on $writers [expr {$phase eq {preparing} ? 0 : 50}]
            cut_links 2 $id
            let_go $phase 0 2
            assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
            wait_writers_go_on $writers 20
            set seen [stop_writers $writers]
            assert_equal {} [dict get $seen errors]
            assert_equal 0 [expr {[dict get $seen ask]+[dict get $seen tryagain]+[dict get $seen twice]}]
            assert_morethan_equal [job_field 0 $id interruptions] 1
            foreach pid $pids {assert {[is_alive $pid]}}
        }
    }

    test "Links lost while the target is prepared and bound: it asks, the attempt is none, the job goes on" {
        home
        fill_moving 0
        set writers [start_writers 2 {5 9 14}]
        wait_writers_go_on $writers 20
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 5 14]
        wait_job_state 2 $id prepared
        wait_job_state 0 $id fenced
        cut_links 2 $id
        failpoint 0 source_before_commit off
        assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
        wait_writers_go_on $writers 20
        set seen [stop_writers $writers]
        assert_equal {} [dict get $seen errors]
        assert_equal {2 2} [list [job_field 0 $id attempt] [job_field 2 $id attempt]]
    }

    test "Of a snapshot that breaks off only what is missing is sent again" {
        home
        fill_strings 0 [slots_of {0 99}] 20000 1000
        set before [slots_dump 0 [slots_of {0 99}]]
        set pids [node_pids]
        failpoint 0 source_before_cut pause
        set id [lindex [R 0 cluster migrate-slots slotsrange 0 99 node [node_id 2] rate 20000000] 0]
        wait_for_condition 1000 5 {[job_field 2 $id keys-done] > 8000} else {fail "[job 2 $id]"}
        cut_links 2 $id
        wait_job_state 0 $id streaming
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_equal 2 [assert_one_owner [slots_of {0 99}] $before $pids]
        set sent [job_field 2 $id bytes-done]
        # 100 sections; what was in flight is of one section and what sockets hold.
        assert_lessthan $sent [expr {20000*1050*1.35}]
    }

    test "A snapshot that breaks off when all slots have arrived is not sent again" {
        home
        fill_strings 0 $::slots 1000 100
        set before [slots_dump 0 $::slots]
        set bytes [job_field 2 [move_slots 0 2 5 14] bytes-done]
        move_slots 2 0 5 14
        set pids [node_pids]
        # Behind the sections come an index, an end and a sum.
        R 0 config set cluster-slot-migration-snapshot fork
        failpoint 0 source_cuts_snapshot fail [expr {$bytes-6}]
        set id [migrate 0 2 5 14]
        wait_migrated 0 2 $id
        failpoints_off 0
        R 0 config set cluster-slot-migration-snapshot auto
        assert_equal 1 [job_field 2 $id interruptions]
        assert_lessthan [job_field 2 $id bytes-done] [expr {$bytes+1000}]
        assert_equal 2 [assert_one_owner $::slots $before $pids]
    }

    test "Twenty interruptions of one job under writes" {
        home
        fill_moving 0
        set writers [start_writers 3 {5 9 14}]
        wait_writers_go_on $writers 20
        set id [hold_in_phase streaming 0 2 5 14]
        for {set i 0} {$i < 20} {incr i} {
            cut_links 2 $id
            wait_job_state 2 $id following
            wait_writers_go_on $writers 5
        }
        let_go streaming 0 2
        assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
        assert_equal {} [dict get [stop_writers $writers] errors]
        assert_morethan_equal [job_field 2 $id interruptions] 20
    }

    test "A backlog that does not reach back: the job begins again by itself and says so" {
        home
        fill_moving 0
        R 0 config set cluster-slot-migration-backlog-size 16kb repl-backlog-size 16kb
        set id [hold_in_phase streaming 0 2 5 14]
        # It comes again, and is kept waiting while the backlog passes on.
        failpoint 0 source_before_attach fail
        cut_links 2 $id
        for {set i 0} {$i < 300} {incr i} {R 0 set [key_in 4000 big] [string repeat x 1000]}
        failpoint 0 source_before_attach off
        wait_for_condition 1000 10 {[job_field 2 $id came-anew] ne ""} else {fail "[job 2 $id]"}
        foreach n {0 2} {assert_match "10 of 10 slots come anew: *backlog does not reach back*" [job_field $n $id came-anew]}
        let_go streaming 0 2
        assert_equal {done done} [list [wait_job_ended 0 $id] [wait_job_ended 2 $id]]
        R 0 config set cluster-slot-migration-backlog-size 64mb repl-backlog-size 1mb
    }

    foreach {how point} {"the links were cut" "" "nothing could attach" source_before_attach} {
        test "A source without replicas keeps its backlog for as long as a job needs it, whatever is configured: $how for 2 MB, no slot comes anew" {
            home
            fill_moving 0
            assert_equal 0 [status [Rn 0] repl_backlog_active]
            with_config {0 {repl-backlog-ttl 1 repl-backlog-size 16kb}} {
                set pids [node_pids]
                set anew [count_log_message -2 "slots come anew"]
                set id [hold_in_phase streaming 0 2 5 14]
                set sections [job_field 2 $id bytes-done]
                # Longer than it would stay.
                set since [status [Rn 0] uptime_in_seconds]
                wait_for_condition 1000 10 {[status [Rn 0] uptime_in_seconds] > $since+3} else {fail "time stands still"}
                if {$point ne ""} {failpoint 0 $point fail}
                failpoint 2 link_is_lost fail
                wait_for_condition 1000 10 {[job_field 2 $id interruptions] > 0} else {fail "no interruption: [job 2 $id]"}
                for {set i 0} {$i < 2000} {incr i} {R 0 append [key_in [expr {5+$i%10}] big] [string repeat x 1000]}
                failpoint 2 link_is_lost off
                if {$point ne ""} {failpoint 0 $point off}
                wait_job_state 2 $id following
                assert_equal 1 [status [Rn 0] repl_backlog_active]
                set before [slots_dump 0 [slots_of {5 14}]]
                let_go streaming 0 2
                wait_migrated 0 2 $id
                assert_equal $sections [job_field 2 $id bytes-done]
                assert_equal $anew [count_log_message -2 "slots come anew"]
                assert_equal 2 [assert_one_owner [slots_of {5 14}] $before $pids]
                wait_for_condition 500 10 {[status [Rn 0] repl_backlog_active] == 0} else {fail "the backlog stays: [R 0 info replication]"}
            }
        }
    }
}
