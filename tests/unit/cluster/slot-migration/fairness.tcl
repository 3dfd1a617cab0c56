# A node has one child process at a time. Snapshots that need one (of a fork), saves,
# rewrites of the append-only file and full synchronizations take turns: each waits and says
# for which, none waits for ever. Node 3 is the replica of node 0, the source.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

proc begin {} {
    set_node_timeouts 60000
    R 0 config set rdb-key-save-delay 0
    # After a test that failed.
    foreach child [node_children 0] {catch {exec kill -9 $child}}
    R 0 cluster cancel-slot-migrations all
    foreach n {0 1 2} {
        wait_for_condition 1000 10 {[jobs_running $n] == 0 && [node_children $n] eq ""} else {fail "node $n is busy: [R $n cluster slot-migrations]"}
    }
    foreach n {0 1 2} {R $n flushall}
    foreach n {1 2} {
        wait_cluster_agrees
        set ranges {}
        foreach range [dict get [cluster_get_myself $n] slots] {
            lassign [split $range -] first last
            if {$first < 100} {lappend ranges $first [expr {$last eq "" ? $first : $last}]}
        }
        if {$ranges ne ""} {move_slots $n 0 {*}$ranges}
    }
    wait_rewritten 0
    wait_copied
    wait_for_condition 500 10 {[node_children 0] eq ""} else {fail "node 0 has a child"}
}

proc wait_copied {} {
    wait_for_condition 3000 10 {[status [Rn 3] master_link_status] eq "up" && [R 3 debug digest] eq [R 0 debug digest]} else {fail "the replica does not follow"}
}

proc rewrites {} {status [Rn 0] aof_rewrites}

proc wait_reason {id pattern} {
    wait_for_condition 1000 10 {[string match $pattern [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
}

# A job whose snapshot does not end until it may be sent faster.
proc long_snapshot {to slot} {
    R 0 set [key_in $slot huge] [string repeat x 16000000]     ;# more than sockets' buffers take
    set id [lindex [R 0 cluster migrate-slots slotsrange $slot $slot node [node_id $to] rate 50000] 0]
    wait_job_state 0 $id snapshot
    wait_for_condition 500 10 {[node_children 0] ne ""} else {fail "nothing was forked: [job 0 $id]"}
    return $id
}

# The replica's copy is no part of its master's history any more.
proc new_replica {{waits 1}} {
    R 0 debug change-repl-id
    R 0 client kill type replica
    if {$waits} {wait_for_condition 1000 10 {[string match "*state=wait_bgsave*" [R 0 info replication]]} else {fail "[R 0 info replication]"}}
}

start_cluster 3 1 {tags {external:skip cluster} overrides {
    save "" cluster-slot-migration-snapshot fork appendonly yes auto-aof-rewrite-percentage 0 repl-diskless-sync-delay 0
    cluster-allow-replica-migration no cluster-require-full-coverage no
}} {
    wait_copied

    foreach {what kind} {
        "a save"                            RDB
        "a rewrite of the append-only file" AOF
        "a full synchronization"            RDB
    } {
        test "What waits behind a snapshot, $what, comes before the next snapshot, which says so" {
            begin
            set first [long_snapshot 2 5]
            R 0 set [key_in 6 k] x
            switch $what {
                "a save" {assert_match "*scheduled*" [R 0 bgsave schedule]}
                "a rewrite of the append-only file" {assert_match "*scheduled*" [R 0 bgrewriteaof]}
                "a full synchronization" new_replica
            }
            set next [migrate 0 1 6 6]
            wait_reason $next "another child process runs (a snapshot of slots)"
            R 0 config set rdb-key-save-delay 100000000
            R 0 cluster alter-slot-migration id $first rate 0
            wait_job_state 0 $first {streaming fenced committed trimming done}
            wait_reason $next "another child process runs ($kind)"
            assert_equal waiting [job_field 0 $next state]
            R 0 config set rdb-key-save-delay 0
            exec kill -9 [node_children 0]
            wait_migrated 0 1 $next
            wait_copied
        }
    }

    test "A save, a rewrite and a full synchronization that wait behind a snapshot all have their turn" {
        begin
        set first [long_snapshot 2 5]
        R 0 set [key_in 6 k] x
        set saves [status [Rn 0] rdb_saves]
        set rewrites [rewrites]
        R 0 bgsave schedule
        R 0 bgrewriteaof
        new_replica
        set next [migrate 0 1 6 6]
        wait_reason $next "another child process runs (a snapshot of slots)"
        R 0 cluster alter-slot-migration id $first rate 0
        wait_migrated 0 2 $first
        wait_migrated 0 1 $next
        wait_rewritten 0
        wait_copied
        assert_equal [expr {$rewrites+1}] [rewrites]
        wait_for_condition 1000 10 {[status [Rn 0] rdb_saves] > $saves} else {fail "no save: [R 0 info persistence]"}
    }

    foreach {command counter kind} {"bgsave schedule" rdb_saves RDB bgrewriteaof aof_rewrites AOF} {
        test "A snapshot has its turn while a client asks for [string toupper $command] without an end" {
            begin
            R 0 set [key_in 6 k] x
            R 0 config set rdb-key-save-delay 100000000
            R 0 {*}$command
            set id [migrate 0 1 6 6]
            wait_reason $id "another child process runs ($kind)"
            R 0 config set rdb-key-save-delay 0
            set before [status [Rn 0] $counter]
            with_asker 0 $command {
                exec kill -9 [node_children 0]
                wait_job_state 0 $id {snapshot streaming fenced committed trimming done}
                set first [expr {[status [Rn 0] $counter]-$before}]
            }
            # By the time that this is looked at, the snapshot may be over and the next one begun.
            assert_lessthan $first 3
            wait_migrated 0 1 $id
        }
    }

    test "Migrations without an end starve neither a rewrite of the append-only file nor a new replica" {
        begin
        for {set slot 0} {$slot < 40} {incr slot} {R 0 set [key_in $slot k] [string repeat x 1000]}
        # Always one more that waits.
        set forks [status [Rn 0] total_forks]
        set rewrites [rewrites]
        set slot 0
        set jobs {}
        for {} {$slot < 4} {incr slot} {lappend jobs [migrate 0 [expr {1+$slot%2}] $slot $slot]}
        R 0 bgrewriteaof
        set syncs [status [Rn 0] sync_full]
        new_replica 0
        set moved 0
        while {$slot < 40 && ([rewrites] == $rewrites || [status [Rn 0] sync_full] == $syncs || [status [Rn 3] master_link_status] ne "up")} {
            foreach id $jobs {if {[job_ended [job_field 0 $id state]]} {set jobs [lsearch -all -inline -not -exact $jobs $id]; incr moved}}
            while {[llength $jobs] < 4 && $slot < 40} {
                if {![catch {migrate 0 [expr {1+$slot%2}] $slot $slot} id]} {lappend jobs $id; incr slot}
            }
        }
        assert_equal [expr {$rewrites+1}] [rewrites]
        assert_equal up [status [Rn 3] master_link_status]
        assert_lessthan $moved 30
        foreach id $jobs {wait_job_state 0 $id done}
        wait_copied
    }
}
