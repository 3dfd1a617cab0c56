# How long hand-offs make writers wait, as the nodes measure it and show it. No time
# is asked of the machine: what is held for a while must show at least that.

source tests/support/slot_migration.tcl

set ::spans {write-pause discarded-pause take-over fsync hand-off}

# What CLUSTER INFO says of a span: a dict of p50 p99 p99.9 max count.
proc span {n name} {
    set line [CI $n cluster_slot_migration_[string map {- _} $name]_usec]
    set fields [split [string map {= ,} $line] ,]
    assert_equal {p50 p99 p99.9 max count} [dict keys $fields] $name
    return $fields
}

# How many samples each node has of each span: a list of dicts.
proc counts {} {
    set all {}
    for {set n 0} {$n < [llength $::servers]} {incr n} {
        set of {}
        foreach name $::spans {dict set of $name [dict get [span $n $name] count]}
        lappend all $of
    }
    return $all
}

# The same with some more: {node span how-many ...}.
proc more {counts args} {
    foreach {n name many} $args {
        set of [lindex $counts $n]
        dict incr of $name $many
        lset counts $n $of
    }
    return $counts
}

proc histogram {n args} {
    R $n latency histogram {*}$args
}

proc reset_all {} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {R $n config resetstat}
}

proc wait_client_waits {n rd} {
    wait_for_condition 500 10 {[regexp {flags=\S*b} [R $n client list id $::client_of($rd)]]} else {
        fail "the client does not wait: [R $n client list]"
    }
}

# A job whose fence stands at node 0 until `body` has run; how many us that took.
proc fenced_for {at_node point body} {
    failpoint $at_node $point pause
    uplevel 1 {set id [migrate 0 2 5 20]}
    wait_job_state 0 [uplevel 1 {set id}] fenced
    set began [clock microseconds]
    uplevel 1 $body
    set took [expr {[clock microseconds]-$began}]
    failpoint $at_node $point off
    return $took
}

start_cluster 3 0 {tags {external:skip cluster}} {
    set moving [key_in 10 k]

    test "A job tells on both nodes what it made writers wait, as far as it is known there" {
        fresh
        R 0 set $moving 1
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 5 20]
        wait_job_state 0 $id streaming
        foreach {n pause} {0 0 2 -1} {
            set job [job $n $id]
            foreach {field value} [list write-pause-us $pause take-over-us -1 fsync-us -1 hand-off-us -1] {
                assert_equal $value [dict get $job $field] "$field at node $n"
            }
        }
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        set source [job 0 $id]
        set target [job 2 $id]
        foreach field {write-pause-us take-over-us fsync-us} {
            assert_morethan [dict get $source $field] 0 $field
            assert_equal [dict get $source $field] [dict get $target $field] $field
        }
        assert_morethan_equal [dict get $source hand-off-us] [expr {[dict get $source write-pause-us]+[dict get $source take-over-us]}]
        assert_equal -1 [dict get $target hand-off-us]
    }

    test "A fence that stands for a while shows in the job and in the histograms; what a client waited too" {
        fresh
        R 0 set $moving 1
        reset_all
        set took [fenced_for 0 source_before_commit {
            set writer [send_command 0 incr $moving]
            set sent [clock microseconds]
            wait_client_waits 0 $writer
            set held [expr {[clock microseconds]-$sent}]
        }]
        assert_error "MOVED 10 *" {$writer read}
        set waited [expr {[clock microseconds]-$sent}]
        $writer close
        wait_migrated 0 2 $id
        set pause [job_field 0 $id write-pause-us]
        assert_morethan_equal $pause $took
        assert_morethan_equal [job_field 0 $id hand-off-us] $pause
        assert_morethan_equal $waited $held
        # One sample: percentiles and max are it, to the histogram's precision.
        foreach {n name field} {0 write-pause write-pause-us 0 hand-off hand-off-us 2 take-over take-over-us 2 fsync fsync-us} {
            set value [job_field $n $id $field]
            dict for {about shown} [span $n $name] {
                if {$about eq "count"} {
                    assert_equal 1 $shown $name
                } else {
                    assert_morethan_equal $shown $value "$name $about"
                    assert_lessthan_equal $shown [expr {$value*1.02+2}] "$name $about"
                }
            }
        }
    }

    test "A commit that is long on its way belongs to the hand-off, not to the pause nor to the take-over" {
        fresh
        R 0 set $moving 1
        failpoint 0 source_before_commit pause
        set id [migrate 0 2 5 20]
        wait_job_state 2 $id prepared
        stop_node 2
        failpoint 0 source_before_commit off
        wait_job_state 0 $id committed
        set began [clock microseconds]
        wait_for_condition 500 10 {[dict get [job 0 $id] phase-ms committed] >= 50} else {fail "[job 0 $id]"}
        set took [expr {[clock microseconds]-$began}]
        continue_node 2
        wait_migrated 0 2 $id
        set job [job 0 $id]
        assert_morethan_equal [dict get $job hand-off-us] [expr {[dict get $job write-pause-us]+$took}]
    }

    test "Each hand-off is counted once at the node that measured it, in both directions" {
        fresh
        set counts [counts]
        for {set i 1} {$i <= 3} {incr i} {
            move_slots 0 2 5 20
            set counts [more $counts 0 write-pause 1 0 hand-off 1 2 take-over 1 2 fsync 1]
            assert_equal $counts [counts]
            move_slots 2 0 5 20
            set counts [more $counts 2 write-pause 1 2 hand-off 1 0 take-over 1 0 fsync 1]
            assert_equal $counts [counts]
        }
    }

    test "An attempt that is given up is counted apart: discarded, and cancelled behind the fence" {
        fresh
        R 0 set $moving 1
        set counts [counts]
        fenced_for 2 target_before_prepared {
            R 0 flushall
            wait_for_condition 500 10 {[string match "*wrote*behind the fence*" [job_field 0 $id reason]] || [job_field 0 $id attempt] >= 2} else {
                fail "the attempt goes on: [job 0 $id]"
            }
        }
        wait_migrated 0 2 $id
        set discarded [expr {[job_field 0 $id attempt]-1}]
        assert_morethan_equal $discarded 1
        set counts [more $counts 0 discarded-pause $discarded 0 write-pause 1 0 hand-off 1 2 take-over 1 2 fsync 1]
        assert_equal $counts [counts]

        fresh
        R 0 set $moving 1
        set counts [counts]
        fenced_for 2 target_before_prepared {
            set writer [send_command 0 incr $moving]
            wait_client_waits 0 $writer
            wait_for_condition 500 10 {[dict get [job 0 $id] phase-ms fenced] >= 20} else {fail "[job 0 $id]"}
            R 0 cluster cancel-slot-migrations id $id
        }
        assert_equal 2 [$writer read]
        $writer close
        wait_job_state 2 $id cancelled
        assert_equal [more $counts 0 discarded-pause 1] [counts]
        assert_morethan_equal [job_field 0 $id write-pause-us] 20000
        assert_morethan_equal [dict get [span 0 discarded-pause] max] 20000
        assert_equal {-1 -1 -1} [list [job_field 0 $id take-over-us] [job_field 0 $id fsync-us] [job_field 0 $id hand-off-us]]
    }

    test "A hand-off whose end the source learns by asking has a write pause, no more" {
        fresh
        R 0 set $moving 1
        set counts [counts]
        failpoint 2 target_after_takeover fail
        set id [migrate 0 2 5 20]
        wait_migrated 0 2 $id
        assert_morethan [job_field 0 $id write-pause-us] 0
        assert_equal {-1 -1 -1} [list [job_field 0 $id take-over-us] [job_field 0 $id fsync-us] [job_field 0 $id hand-off-us]]
        assert_morethan [job_field 2 $id take-over-us] 0
        assert_equal [more $counts 0 write-pause 1 2 take-over 1 2 fsync 1] [counts]
    }

    test "LATENCY HISTOGRAM and INFO latencystats show them as they show commands" {
        fresh
        move_slots 0 2 5 20
        move_slots 2 0 5 20
        reset_all
        foreach n {0 2} {
            assert_equal "" [histogram $n slot-migration]
            assert_no_match "*slot-migration|*" [R $n info latencystats]
        }
        move_slots 0 2 5 20
        foreach n {0 2} {R $n ping}
        foreach {n names} {0 {write-pause hand-off} 2 {take-over fsync}} {
            set expected {}
            foreach name $names {lappend expected slot-migration|$name}
            set all [histogram $n]
            assert_equal $expected [dict keys [histogram $n slot-migration]] "node $n"
            assert_equal $expected [lsearch -all -inline [dict keys $all] slot-migration*]
            assert_not_equal -1 [lsearch [dict keys $all] cluster|*]
            foreach name $expected {
                assert_equal $name [dict keys [histogram $n no-such-command [string toupper $name]]]
                set about [dict get $all $name]
                assert_equal {calls histogram_usec} [dict keys $about]
                assert_equal 1 [dict get $about calls]
                assert_equal 1 [lindex [dict get $about histogram_usec] end]
                set edge [lindex [dict get $about histogram_usec] end-1]
                set value [dict get [span $n [string map {slot-migration| ""} $name]] max]
                assert_morethan_equal $edge $value
                assert_lessthan $edge [expr {2*$value+2}]
                assert_match "*latency_percentiles_usec_$name:p50=*,p99=*,p99.9=*" [R $n info latencystats]
            }
            # With commands beside them.
            assert_equal [list ping slot-migration|[lindex $names 0]] [dict keys [histogram $n ping slot-migration|[lindex $names 0]]]
        }
        # The same shape as a map of RESP3.
        set c [connect 0]
        $c hello 3
        assert_equal [histogram 0 slot-migration] [$c latency histogram slot-migration]
        $c close
        # No command goes by this name.
        assert_equal {{}} [R 0 command info slot-migration]
    }

    test "CONFIG RESETSTAT empties them, LATENCY RESET does not, as with those of commands" {
        fresh
        move_slots 0 2 5 20
        set before [histogram 0 slot-migration]
        assert_not_equal "" $before
        R 0 latency reset
        assert_equal $before [histogram 0 slot-migration]
        R 0 config resetstat
        assert_equal "" [histogram 0 slot-migration]
        assert_equal "" [lsearch -all -inline [dict keys [histogram 0]] slot-migration*]
        foreach name $::spans {assert_equal {p50 0 p99 0 p99.9 0 max 0 count 0} [span 0 $name]}
        assert_not_equal "" [histogram 2 slot-migration]
    }

    test "CONFIG RESETSTAT in the middle of a hand-off does it no harm" {
        fresh
        fenced_for 0 source_before_commit reset_all
        wait_migrated 0 2 $id
        assert_equal 1 [dict get [span 0 write-pause] count]
        assert_equal 1 [dict get [span 2 take-over] count]
    }
}
