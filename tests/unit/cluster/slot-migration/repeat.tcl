# Moves in a row cost nothing that stays, and lose nothing.

source tests/support/slot_migration.tcl

start_cluster 3 0 {tags {external:skip cluster}} {
    test "20 moves there and back under load lose no write and leave nothing behind" {
        fresh
        set slots [slots_of {0 19}]
        fill_strings 0 $slots 20000 50
        foreach slot {1 2 3} {fill_all_types 0 $slot}
        # The first move makes what a node makes once (the backlog).
        move_slots 0 2 0 19
        move_slots 2 0 0 19
        wait_cluster_agrees
        set keys [R 0 dbsize]
        set base0 [footprint 0]
        set base2 [footprint 2]
        set epoch [CI 1 cluster_current_epoch]
        set writers [start_writers 3 {1 5 19 100 7000 12000}]
        wait_writers_go_on $writers
        for {set i 0} {$i < 20} {incr i} {
            if {$i % 2} {move_slots 2 0 0 19} else {move_slots 0 2 0 19}
            wait_writers_go_on $writers 20
        }
        assert_equal [expr {$epoch+20}] [CI 1 cluster_current_epoch]
        set seen [stop_writers $writers]
        assert_equal {} [dict get $seen errors]
        foreach what {ask tryagain twice} {assert_equal 0 [dict get $seen $what] $what}
        # Each writer: two slots at other nodes, then three slots twenty times.
        assert_equal [expr {3*(2+3*20)}] [dict get $seen moved]
        # Its two keys in each of four slots of node 0.
        assert_equal [expr {$keys+3*2*4}] [R 0 dbsize]
        assert_equal [expr {3*2}] [R 2 dbsize]
        foreach slot {1 5 19 100} {foreach w {0 1 2} {
            R 0 del [key_in $slot writer:$w:counter] [key_in $slot writer:$w:list]
        }}
        assert_equal $keys [R 0 dbsize]
        wait_no_leftovers 0 $base0
        wait_no_leftovers 2 $base2
        assert_equal {} [keys_in_slots 2 $slots]
    }

    test "20 cancelled jobs in a row leave nothing behind" {
        fresh
        fill_strings 0 [slots_of {0 19}] 20000 200
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 0 19]
        wait_job_state 0 $id streaming
        R 0 cluster cancel-slot-migrations id $id
        wait_for_condition 500 10 {[jobs_running 2] == 0} else {fail "the target goes on"}
        set digest [R 0 debug digest]
        set base0 [footprint 0]
        set base2 [footprint 2]
        for {set i 0} {$i < 20} {incr i} {
            set id [migrate 0 2 0 19]
            wait_job_state 0 $id streaming
            assert_equal 1 [R [expr {$i%2 ? 2 : 0}] cluster cancel-slot-migrations id $id]
            wait_for_condition 500 10 {[jobs_running 0] + [jobs_running 2] == 0} else {fail "a job goes on"}
        }
        wait_no_leftovers 0 $base0
        wait_no_leftovers 2 $base2
        assert_equal $digest [R 0 debug digest]
        failpoint 0 source_before_cut off
        move_slots 0 2 0 19
        assert_equal 20000 [R 2 dbsize]
    }

    test "Jobs that start together, on slots next to each other, all come to their end" {
        fresh
        fill_strings 0 [slots_of {0 59}] 6000
        set digest [R 0 debug digest]
        set ids {}
        for {set i 0} {$i < 6} {incr i} {lappend ids [migrate 0 [expr {1+$i%2}] [expr {$i*10}] [expr {$i*10+9}]]}
        assert_equal 6 [llength [lsort -unique $ids]]
        for {set i 0} {$i < 6} {incr i} {wait_migrated 0 [expr {1+$i%2}] [lindex $ids $i]}
        assert_equal 0 [R 0 dbsize]
        assert_equal 3000 [R 1 dbsize]
        assert_equal 3000 [R 2 dbsize]
        move_slots 1 0 0 9 20 29 40 49
        move_slots 2 0 10 19 30 39 50 59
        assert_equal $digest [R 0 debug digest]
    }

    test "A node of upstream's that looks on follows every move" {
        fresh
        fill_strings 0 [slots_of {0 19}] 200
        with_vanilla_node {
            for {set i 0} {$i < 4} {incr i} {
                if {$i % 2} {move_slots 2 0 0 19} else {move_slots 0 2 0 19}
                set owner [node_port [expr {$i % 2 ? 0 : 2}]]
                wait_for_condition 500 10 {![catch {$vanilla get [key_in 19 k]} e] || [string match "MOVED 19 *:$owner" $e]} else {
                    fail "the unpatched node sends clients to $e, expected port $owner"
                }
                assert_error "MOVED 19 *:$owner" {$vanilla get [key_in 19 k]}
            }
            assert_equal ok [getInfoProperty [$vanilla cluster info] cluster_state]
        }
    }
}
