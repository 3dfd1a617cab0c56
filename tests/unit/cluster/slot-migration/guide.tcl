# The operator's guide, src/OPERATING.md: each block of it does what it says.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

proc guide_text {} {
    set fd [open src/OPERATING.md]
    set text [read $fd]
    close $fd
    return $text
}

# The guide's blocks: name -> text.
proc guide_blocks {} {
    set blocks {}
    set name ""
    foreach line [split [guide_text] "\n"] {
        if {[regexp {^```sh ([a-z-]+)$} $line -> name]} {
            dict set blocks $name ""
        } elseif {$line eq "```"} {
            set name ""
        } elseif {$name ne ""} {
            dict append blocks $name "$line\n"
        }
    }
    return $blocks
}

# Run a block as a reader would, with these variables: its output. An error is its status.
proc run_block {name args} {
    set script "set -u\n[dict get $::blocks words]\n"
    dict for {variable address} $args {append script "$variable=$address\n"}
    append script "set -e\n[dict get $::blocks $name]\n"
    if {[catch {exec -ignorestderr env -u REDISCLI_AUTH NO_COLOR=1 PATH=[file normalize src]:$::env(PATH) timeout 100 sh -c $script 2>@1} out]} {
        error "the block '$name' of the guide failed: $out"
    }
    lappend ::blocks_run $name
    return $out
}

proc addr {n} {
    return 127.0.0.1:[node_port $n]
}

# What the tests that follow begin with: node 0 has the slots 0 to 100, and keys in two of them.
proc begin {} {
    fresh_shards [slots_of {0 100}]
    fill_strings 0 {10 50} 100
}

set ::blocks [guide_blocks]
set ::blocks_run {}

start_cluster 3 3 {tags {external:skip cluster tls:skip} overrides {cluster-allow-replica-migration no}} {
    wait_replicas_up
    set any [addr 1]
    foreach n {0 1 2} {fill_strings $n [slots_of [list [expr {$n*5461+10}] [expr {$n*5461+2000}]]] 2000}

    with_servers {new newreplica} {
        test "Add a shard: it has its share, and so has its replica" {
            run_block add-shard any $any new $new newreplica $newreplica
            assert_equal 4096 [slots_of_master $new]
            assert_morethan [at $new dbsize] 100
            wait_for_condition 500 10 {[at $newreplica dbsize] == [at $new dbsize]} else {fail "the replica has [at $newreplica dbsize] keys"}
        }

        test "Remove a shard: the others have its slots, and nobody knows it" {
            set id [at $new cluster myid]
            set replica [at $newreplica cluster myid]
            run_block remove-shard any $any leaving $new
            foreach n {0 1 2} {
                assert_no_match "*$id*" [R $n cluster nodes]
                assert_no_match "*$replica*" [R $n cluster nodes]
            }
            assert_equal 6000 [expr {[R 0 dbsize]+[R 1 dbsize]+[R 2 dbsize]}]
            assert_equal 16384 [expr {[slots_of_master [addr 0]]+[slots_of_master [addr 1]]+[slots_of_master [addr 2]]}]
            wait_cluster_agrees
        }
    }

    test "Empty a node for a while: it is empty, then has the same slots and keys again" {
        begin
        set slots [dict get [cluster_get_myself 0] slots]
        set dump [slots_dump 0 {10 50}]
        run_block evacuate any $any leaving [addr 0] target [addr 2]
        wait_cluster_agrees
        assert_equal $slots [dict get [cluster_get_myself 0] slots]
        assert_same_dump $dump [slots_dump 0 {10 50}]
    }

    test "Copy now, flip at the planned minute: writes go on, the slots are the target's" {
        begin
        set writers [start_writers 2 {10 11}]
        wait_writers_go_on $writers
        run_block planned-flip any $any source [addr 0] target [addr 2]
        set seen [stop_writers $writers]
        assert_equal {0 0 {}} [list [dict get $seen ask] [dict get $seen tryagain] [dict get $seen errors]]
        wait_cluster_agrees
        assert_equal {2 2 0} [list [slot_owner 1 0] [slot_owner 1 99] [slot_owner 1 100]]
    }

    test "Slow it down, stop it, call it off: the source has its slots" {
        begin
        run_block control source [addr 0] target [addr 2]
        set job [lindex [R 0 cluster slot-migrations] 0]
        assert_equal {cancelled 0 0} [list [dict get $job state] [dict get $job paused] [dict get $job rate-limit]]
        assert_equal 0 [slot_owner 1 50]
        wait_for_condition 500 10 {[jobs_running 2] == 0} else {fail "the target goes on"}
    }

    test "Look at it: what the guide shows is there" {
        set id [move_slots 0 2 50 50]
        set out [run_block look any [addr 0]]
        foreach pattern [list "*$id  50 (1 slot) from [addr 0] to [addr 2]  done*" "*\"id\":\"$id\"*" "*keys-total*" \
            "*cluster_slot_migrations_done:*" "*mem_cluster_slot_migration_shadow:0*" "*calls*histogram_usec*"] {
            assert_match $pattern $out
        }
        move_slots 2 0 50 50
    }

    test "Before a downgrade: it tells whether a migration runs" {
        run_block before-downgrade any $any
        set id [lindex [R 0 cluster migrate-slots slotsrange 5 5 node [node_id 2] hold] 0]
        wait_for_condition 1500 10 {[string match "ready and held*" [job_field 0 $id reason]]} else {fail "[job 0 $id]"}
        assert_error "*'before-downgrade'*Slot migrations that run: 1*$id*" {run_block before-downgrade any $any}
        R 0 cluster cancel-slot-migrations id $id
        wait_for_condition 500 10 {[jobs_running 2] == 0} else {fail "the target goes on"}
        run_block before-downgrade any $any
    }

    test "Back up: the file's slots are listed and verified" {
        set out [run_block backup any [addr 0]]
        foreach slot {10 50} {assert_match "*\n *$slot *50 *0 *" $out}
        assert_match "*2 slots, 100 keys*" $out
    }

    # What an operator looks up must be what the server says.
    test "The guide names every state, and every CLUSTER INFO field that it names is there" {
        set text [guide_text]
        set fd [open src/slotmig_job.c]
        regexp {slotmig_state_names\[SLOTMIG_NUM_STATES\] = \{([^\}]*)\}} [read $fd] -> names
        close $fd
        foreach {- state} [regexp -all -inline {"(\w+)"} $names] {assert_match "*`$state`*" $text $state}
        set info "[R 0 cluster info][R 0 info memory]"
        foreach field [lsort -unique [regexp -all -inline {\mcluster_slot_migration\w+|\mmem_cluster_slot_migration\w+} $text]] {
            assert_match "*$field*" $info $field
        }
        foreach name [lsort -unique [regexp -all -inline {cluster-slot-migration(?:-[a-z]+)+} $text]] {
            assert_equal 2 [llength [R 0 config get $name]] $name
        }
        foreach {- event} [regexp -all -inline {slot-migration(\\?\|[a-z-]+)} $text] {
            assert_match "*slot-migration[string trimleft $event {\\}]*" [R 0 info latencystats][R 2 info latencystats]slot-migration|discarded-pause
        }
    }

    test "The guide has no block that no test here has run" {
        assert_equal [lsort [dict keys [dict remove $::blocks words]]] [lsort -unique $::blocks_run]
    }
}
