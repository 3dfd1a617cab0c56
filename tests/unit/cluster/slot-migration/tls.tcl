# Which port and transport a job takes is what a replica's link takes. Run with
# --tls-module (or --tls): see tests/README.md; without, there is nothing in here.

source tests/support/slot_migration.tcl

if {$::tls} {

# The ports of node 0 that node n is connected to as a client.
proc ports_taken {n} {
    set taken {}
    foreach what {tls-port port} {
        set port [lindex [R 0 config get $what] 1]
        if {$port && [llength [connections_to $n $port]]} {lappend taken $what}
    }
    return $taken
}

foreach {cluster replication plain ::expected} {
    yes yes ""       tls-port
    yes yes {port 0} tls-port
    yes no  ""       port
    no  yes ""       tls-port
    no  no  ""       port
} {
    set ::title "tls-cluster $cluster, tls-replication $replication"
    if {$plain ne ""} {append ::title ", no plain port"}
    start_cluster 2 1 [list tags {external:skip cluster} overrides [list tls-cluster $cluster tls-replication $replication {*}$plain]] {
        test "With $::title a job goes where a replica's link does" {
            wait_for_condition 500 10 {[status [Rn 2] master_link_status] eq "up"} else {fail "the replica does not attach"}
            assert_equal $::expected [ports_taken 2]
            # It leaves, and comes back as a master without slots.
            R 2 cluster reset
            R 2 cluster meet 127.0.0.1 [lindex [R 0 config get [expr {[lindex [R 0 config get tls-cluster] 1] ? "tls-port" : "port"}]] 1]
            wait_for_condition 1000 10 {[CI 2 cluster_known_nodes] == 3 && [CI 2 cluster_current_epoch] >= [CI 0 cluster_current_epoch]} else {fail [R 2 cluster nodes]}
            R 2 cluster bumpepoch
            wait_for_condition 1000 10 {[cluster_agrees]} else {fail "the replica does not come back: [cluster_view 0]\n[cluster_view 1]\n[cluster_view 2]"}
            wait_for_condition 1000 10 {[status [Rn 0] connected_slaves] == 0} else {fail "node 0 has a replica"}

            foreach slot {5 6} {fill_all_types 0 $slot}
            set before [slots_dump 0 {5 6}]
            failpoint 0 source_before_cut pause
            set id [migrate 0 1 5 6]
            wait_job_state 0 $id streaming
            assert_equal $::expected [ports_taken 1]
            R 0 set [key_in 5 live] streamed
            failpoint 0 source_before_cut off
            wait_migrated 0 1 $id
            set after [slots_dump 1 {5 6}]
            assert_equal streamed [R 1 get [key_in 5 live]]
            dict unset after [key_in 5 live]
            assert_same_dump $before $after
            # The owner is asked the same way.
            move_slots 1 0 5 5
            set id [lindex [R 1 cluster migrate-slots slotsrange 5 5 node [node_id 1]] 0]
            wait_migrated 0 1 $id
        }
    }
}

start_cluster 2 0 {tags {external:skip cluster}} {
    test "A certificate that is not accepted fails the job, which says so; the next succeeds" {
        fresh
        fill_all_types 0 5
        set before [slots_dump 0 5]
        foreach n {0 1} {set footprint$n [footprint $n]}
        set other [pwd]/tests/tls/redis.crt
        with_config [list 0 [list tls-ca-cert-file $other]] {
            assert_error "*the target [node_id 1] *refuses: *certificate*" {migrate 0 1 5 5}
        }
        with_config [list 1 [list tls-ca-cert-file $other]] {
            # Node 1 does not even take the offer: to it node 0's certificate is as bad.
            assert_error "*the target [node_id 1] *refuses: *" {migrate 0 1 5 5}
        }
        foreach n {0 1} {
            assert_equal 0 [jobs_running $n]
            wait_no_leftovers $n [set footprint$n]
        }
        move_slots 0 1 5 5
        assert_same_dump $before [slots_dump 1 5]
    }

    test "A connection that breaks in the middle is made again over TLS as over TCP" {
        fresh
        fill_all_types 0 5
        set before [slots_dump 0 5]
        failpoint 1 target_before_section pause
        set id [migrate 0 1 5 5]
        wait_job_state 0 $id snapshot
        kill_node 1
        wait_job_state 0 $id waiting
        start_node_again 1
        wait_migrated 0 1 $id
        wait_cluster_agrees
        assert_same_dump $before [slots_dump 1 5]
    }
}

# Replicas of both sides get their part over their own links.
start_cluster 3 3 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {
    set slots {3 4 5 6}

    test "Slots move between shards with replicas over TLS, under load: these have the same, nobody copies anew" {
        fresh_shards $slots
        foreach slot {3 4} {fill_all_types 0 $slot}
        fill_strings 0 $slots 2000 1000
        foreach n {0 2} {set syncs($n) [status [Rn $n] sync_full]}
        set writers [start_writers 2 $slots]
        wait_writers_go_on $writers
        set id [migrate 0 2 3 6]
        wait_migrated 0 2 $id
        wait_writers_go_on $writers
        assert_equal {} [dict get [stop_writers $writers] errors]
        foreach n {0 2} {
            wait_shard_agrees $n $slots
            assert_equal $syncs($n) [status [Rn $n] sync_full]
        }
        assert_equal 0 [R 3 dbsize]
    }

    test "The target's replica is promoted over TLS while both are prepared: it gets the slots, no write is lost" {
        fresh_shards $slots
        fill_strings 0 $slots 1000
        set writers [start_writers 1 $slots]
        wait_writers_go_on $writers
        set_failover_timeouts 1000
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 3 6]
        wait_job_state 2 $id prepared
        wait_for_condition 1000 10 {[job_field 5 $id state] eq "prepared"} else {fail "[job 5 $id]"}
        R 5 cluster failover
        wait_promoted 5
        failpoint 0 source_before_commit off
        for {set n 0} {$n < 6} {incr n} {
            wait_for_condition 1500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
        }
        set_failover_timeouts 3000
        wait_writers_go_on $writers
        stop_writers $writers
        wait_replicas_up
        wait_cluster_agrees
        assert_equal done [job_field 0 $id state]
        assert_equal 5 [slot_owner 0 3]
        foreach shard {0 2} {wait_shard_agrees $shard $slots}
        # 1000, and the writer's two a slot.
        assert_equal 1008 [R 5 dbsize]
        assert_equal 0 [R 0 dbsize]
    }
}

}
