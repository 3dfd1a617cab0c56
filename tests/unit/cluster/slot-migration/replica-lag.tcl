# A replica of the target that is slow, while much is loaded and written: what waits
# for it at the target is bounded, it is not thrown out, the job waits and says so,
# and in the end both have the same. Shards are of nodes 0 and 3, 1 and 4, 2 and 5.

source tests/support/slot_migration.tcl

set ::slots {3 4 5 6 7 8 9 10}

# Bytes that wait at node 2 to be sent to its replica, the most of them so far.
proc look_at_output {} {
    set bytes [status [Rn 2] mem_clients_slaves]
    set ::replica_lag [expr {max($::replica_lag,$bytes)}]
}

# Run the body with a limit of `mb` for what waits for a replica; none may be thrown
# out, or copy everything anew.
proc with_output_limit {mb body} {
    set ::replica_lag 0
    R 2 config set client-output-buffer-limit "replica ${mb}mb 0 0"
    set syncs [status [Rn 2] sync_full]
    set partial [status [Rn 2] sync_partial_ok]
    set failed [catch {uplevel 1 $body} error options]
    if {!$failed} {
        set failed [catch {
            assert_equal $syncs [status [Rn 2] sync_full] "full synchronizations"
            assert_equal $partial [status [Rn 2] sync_partial_ok] "partial synchronizations"
        } error options]
    }
    exec kill -CONT [node_pid 5]
    R 2 config set client-output-buffer-limit "replica 256mb 64mb 60"
    upvar writers writers
    if {$failed && [info exists writers]} {foreach writer $writers {close [open [lindex $writer 1].stop w]}}
    if {$failed} {return -options $options $error}
}

# The replica stands still; the others do not mark it as failing.
proc stop_replica {} {
    for {set n 0} {$n < 6} {incr n} {R $n config set cluster-node-timeout 60000}
    pause_process [node_pid 5]
}

start_cluster 3 3 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {

    test "A snapshot of 40 MB does not pile up for a replica that stands still, and is there when it goes on" {
        fresh_shards $::slots
        fill_strings 0 $::slots 4000 10000
        set before [slots_dump 0 $::slots]
        with_output_limit 4 {
            failpoint 2 target_before_section pause
            set id [migrate 0 2 3 10]
            wait_job_state 2 $id loading
            stop_replica
            failpoint 2 target_before_section off
            wait_for_condition 1500 10 {[look_at_output] ne "" && [job_field 2 $id bytes-done] > 0} else {fail "[job 2 $id]"}
            for {set i 0} {$i < 200} {incr i} {look_at_output}
            assert_equal 0 [slot_owner 0 5]
            resume_process [node_pid 5]
            wait_job_state 0 $id done
            wait_migrated 0 2 $id
            assert_lessthan $::replica_lag [expr {2*1024*1024}]
        }
        assert_same_dump $before [slots_dump 2 $::slots]
        wait_shard_agrees 2 $::slots
    }

    test "Under load, a replica that stands still now and then is not thrown out, no write is lost" {
        fresh_shards $::slots
        fill_strings 0 $::slots 2000 5000
        with_output_limit 16 {
            set writers [start_writers 2 $::slots]
            wait_writers_go_on $writers
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 3 10]
            for {set i 0} {$i < 5} {incr i} {
                stop_replica
                wait_writers_go_on $writers 300
                look_at_output
                resume_process [node_pid 5]
                wait_writers_go_on $writers 100
            }
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            wait_writers_go_on $writers
            assert_equal {} [dict get [stop_writers $writers] errors]
        }
        wait_shard_agrees 0 $::slots
        wait_shard_agrees 2 $::slots
    }
}
