# Random values of every type and encoding arrive as they were: with whatever
# limits the two nodes are configured, with their expiry times, past ones too,
# with how often and how long ago they were used, and those of modules.
#
# What is generated follows from a seed that a failure names; SLOTMIG_SEED=n
# makes the same again.

source tests/support/slot_migration.tcl

# ---- chance ----

# Evaluate the body with a seed; an error tells which.
proc seeded {body} {
    set seed [expr {[info exists ::env(SLOTMIG_SEED)] ? $::env(SLOTMIG_SEED) : [clock milliseconds] % 1000000}]
    expr {srand($seed)}
    if {[catch {uplevel 1 $body} error options]} {
        return -options $options "$error\n(SLOTMIG_SEED=$seed)"
    }
}

# A whole number, from..to.
proc rnd {from to} {
    expr {$from + int(rand()*($to-$from+1))}
}

proc one_of {args} {
    lindex $args [rnd 0 [expr {[llength $args]-1}]]
}

proc chance {percent} {
    expr {rand()*100 < $percent}
}

# Bytes: text that compresses, digits, or anything.
proc bytes {len} {
    switch [rnd 0 3] {
        0 {set unit [string index abc123 [rnd 0 5]]}
        1 {set unit "some text $len, "}
        default {
            set unit ""
            for {set i 0} {$i < min($len,512)} {incr i} {append unit [binary format c [rnd 0 255]]}
        }
    }
    if {$unit eq ""} {return ""}
    string range [string repeat $unit [expr {$len/[string length $unit]+1}]] 0 [expr {$len-1}]
}

# An element of a collection: mostly short, sometimes empty, a number or long.
proc element {{long 100}} {
    switch [rnd 0 9] {
        0 {return ""}
        1 {return [rnd -20 20]}
        2 {return [rnd -100000 100000]}
        3 {return [one_of 9223372036854775807 -9223372036854775808 2147483648 -32769 00 1.5 -0]}
        4 {return [bytes [rnd 1 $long]]}
        default {return "e[rnd 0 1000000]"}
    }
}

# Of `n` different ones; those made by the number are different for sure.
proc elements {n {long 100}} {
    set seen [dict create]
    for {set i 0} {$i < $n} {incr i} {
        set e [element $long]
        if {[dict exists $seen $e]} {set e "n$i"}
        dict set seen $e 1
    }
    dict keys $seen
}

proc score {} {
    switch [rnd 0 5] {
        0 {one_of inf -inf 0 -0.0 1e308 -1.7976931348623157e308}
        1 {one_of 4.9e-324 -4.9e-324 2.2250738585072014e-308 2.225073858507201e-308}
        2 {one_of 3 3 3.0000000000000004}
        3 {rnd -1000000 1000000}
        default {expr {(rand()-0.5)*pow(10,[rnd -20 20])}}
    }
}

# ---- the generator: one procedure for each kind of value ----
#
# Each makes one value at $key, with commands sent by `g`.

# Send a command on the generator's connection; g_end waits for all answers.
proc g {args} {
    $::g {*}$args
    lappend ::g_sent [string range $args 0 100]
    if {[llength $::g_sent] >= 200} g_answers
}

proc g_answers {} {
    foreach sent $::g_sent {
        if {[catch {$::g read} error]} {set ::g_sent {}; error "$error: $sent"}
    }
    set ::g_sent {}
}

proc g_begin {n} {
    set ::g [redis_deferring_client -$n]
    set ::g_sent {}
}

proc g_end {} {
    g_answers
    $::g close
}

proc make_str:shared key {g set $key [rnd 0 9999]}
proc make_str:int key {g set $key [one_of [rnd -100000 -1] [rnd 10000 1000000] 9223372036854775807 -9223372036854775808]}
proc make_str:embstr key {g set $key [string range "x[bytes 43]" 0 [rnd 0 43]]}
proc make_str:raw key {g set $key [bytes [rnd 45 3000]]}
proc make_str:empty key {g set $key ""}
proc make_str:appended key {
    # raw, although short or a number
    g set $key [rnd 1 99]
    g append $key [one_of 5 x [bytes [rnd 1 20]]]
}
proc make_str:not_quite_int key {g set $key [one_of 9223372036854775808 00 -0 +1 " 1" 1e3]}
proc make_str:sparse key {
    # With SETRANGE alone upstream counts a new key twice in its INFO keysizes.
    g set $key x
    g setrange $key [rnd 1 100000] end
}
proc make_bitmap key {
    for {set i [rnd 1 50]} {$i > 0} {incr i -1} {g setbit $key [rnd 0 100000] 1}
    g bitfield $key set i13 [rnd 0 1000] [rnd -4096 4095] overflow sat incrby u63 #3 12345678901
}
proc make_hll:sparse key {
    g pfadd $key {*}[elements [rnd 1 100]]
    if {[chance 50]} {g pfcount $key}
}
proc make_hll:dense key {
    set many {}
    for {set i 0} {$i < 5000} {incr i} {lappend many $i}
    g pfadd $key {*}$many
    if {[chance 50]} {g pfcount $key}
}
proc make_geo key {
    for {set i [rnd 1 200]} {$i > 0} {incr i -1} {
        g geoadd $key [expr {rand()*360-180}] [expr {rand()*170-85}] [element]
    }
}

proc make_list:lp key {g rpush $key {*}[elements [rnd 1 20]]}
proc make_list:ql key {
    for {set i [rnd 5 20]} {$i > 0} {incr i -1} {g [one_of rpush lpush] $key {*}[elements [rnd 100 200] 500]}
    # Holes and nodes that are not full.
    for {set i [rnd 0 20]} {$i > 0} {incr i -1} {
        set at [rnd 0 300]
        g lset $key $at [element 1000]
        g linsert $key [one_of before after] e[rnd 0 1000000] [element]
    }
    g ltrim $key [rnd 0 100] [rnd -50 -1]
}
proc make_list:plain key {
    g rpush $key {*}[elements [rnd 1 100]] [bytes [rnd 8200 30000]] {*}[elements [rnd 1 100]]
    g lpush $key [bytes [rnd 100000 200000]] [element]
}
proc make_list:shrunk key {
    g rpush $key {*}[elements 2000]
    g ltrim $key 0 [rnd 0 3]
}

proc make_set:int16 key {g sadd $key {*}[numbers [rnd 1 400] 32767]}
proc make_set:int32 key {g sadd $key -70000 {*}[numbers [rnd 1 400] 2147483647]}
proc make_set:int64 key {g sadd $key -5000000000 {*}[numbers [rnd 1 400] 1e18]}
proc make_set:lp key {g sadd $key x {*}[elements [rnd 1 60] 60]}
proc make_set:ht key {g sadd $key x {*}[elements [rnd 300 2000] 60]}
proc make_set:ht_of_ints key {g sadd $key {*}[numbers [rnd 3000 5000] 1e15]}
proc make_set:long key {g sadd $key x [bytes [rnd 65 5000]]}
proc make_set:shrunk key {
    g sadd $key x {*}[set all [elements 600]]
    g srem $key {*}[lrange $all [rnd 1 10] end]
}
proc make_set:big key {
    for {set i 0} {$i < 10} {incr i} {
        set some {}
        for {set j 0} {$j < 2000} {incr j} {lappend some "member:$i:$j"}
        g sadd $key {*}$some
    }
}
proc numbers {n most} {
    for {set i 0} {$i < $n} {incr i} {lappend numbers [expr {round((rand()*2-1)*$most)}]}
    return $numbers
}

proc scored {elements} {
    foreach e $elements {lappend scored [score] $e}
    return $scored
}
proc make_zset:lp key {g zadd $key {*}[scored [elements [rnd 1 60] 60]]}
proc make_zset:sl key {g zadd $key {*}[scored [elements [rnd 300 2000] 60]]}
proc make_zset:long key {g zadd $key 1 a {*}[scored [list [bytes [rnd 65 5000]] z]]}
proc make_zset:equal key {
    set score [score]
    foreach e [elements [rnd 2 200]] {lappend scored $score $e}
    g zadd $key {*}$scored
}
proc make_zset:special key {
    g zadd $key inf a -inf b 0 c -0.0 d 4.9e-324 e -4.9e-324 f 2.2250738585072009e-308 g 1.7976931348623157e308 h 0.1 i
    if {[chance 50]} {g zadd $key {*}[scored [elements 300]]}
}
proc make_zset:shrunk key {
    g zadd $key {*}[scored [elements 400]]
    g zremrangebyrank $key [rnd 1 10] -1
}

proc pairs {n long} {
    foreach f [elements $n 60] {lappend pairs $f [element $long]}
    return $pairs
}
proc make_hash:lp key {g hset $key {*}[pairs [rnd 1 60] 60]}
proc make_hash:ht key {g hset $key {*}[pairs [rnd 600 2000] 200]}
proc make_hash:long key {g hset $key f [bytes [rnd 65 20000]] {*}[pairs 5 60]}
proc make_hash:shrunk key {
    g hset $key {*}[set all [pairs 700 20]]
    g hdel $key {*}[lrange [dict keys $all] [rnd 1 10] end]
}
# Expiry times of fields: all sorts of sizes, many the same.
proc field_ttls {key fields} {
    set now [clock milliseconds]
    set same [expr {$now+[rnd 100000000 1000000000]}]
    foreach f $fields {
        if {[chance 40]} continue
        g hpexpireat $key [one_of $same $same [expr {$now+[rnd 1000000 2000000000]}] 4000000000000 70368744177663] fields 1 $f
    }
}
proc make_hash:lpex key {
    g hset $key {*}[set all [pairs [rnd 1 60] 60]]
    g hpexpire $key 1000000000 fields 1 [lindex $all 0]
    field_ttls $key [dict keys $all]
}
proc make_hash:htex key {
    g hset $key {*}[set all [pairs [rnd 600 1500] 60]]
    g hpexpire $key 1000000000 fields 1 [lindex $all 0]
    field_ttls $key [dict keys $all]
}
proc make_hash:persisted key {
    # It had field TTLs, none is left.
    g hset $key {*}[set all [dict create {*}[pairs [one_of 5 700] 20]]]
    g hexpire $key 100000 fields [dict size $all] {*}[dict keys $all]
    g hpersist $key fields [dict size $all] {*}[dict keys $all]
}
# Past due, if nobody looks.
proc make_hash:lpdue key {
    make_hash:lpex $key
    g hset $key due:1 a due:2 ""
    g hpexpire $key 1 fields 2 due:1 due:2
}
proc make_hash:htdue key {
    make_hash:htex $key
    for {set i 0} {$i < 50} {incr i} {g hset $key due:$i $i}
    for {set i 0} {$i < 50} {incr i} {g hpexpire $key 1 fields 1 due:$i}
}
proc make_hash:alldue key {
    g hset $key {*}[set all [dict create {*}[pairs [one_of 3 700] 20]]]
    g hpexpire $key 1 fields [dict size $all] {*}[dict keys $all]
}

# Whatever can be done to a stream, in any order.
proc make_stream key {
    set ids {}
    set ms 1
    set groups {}
    for {set i [rnd 20 200]} {$i > 0} {incr i -1} {
        switch [rnd 0 11] {
            0 - 1 - 2 - 3 - 4 {
                set id "[incr ms [rnd 0 3]]-[llength $ids]"
                lappend ids $id
                if {[chance 60]} {g xadd $key $id f [element] g [element]} else {g xadd $key $id {*}[pairs [rnd 1 5] 50]}
            }
            5 {if {$ids ne ""} {g xdel $key [one_of {*}$ids] [one_of {*}$ids]}}
            6 {if {$ids ne "" && [llength $groups] < 4} {
                set group "group[llength $groups]"
                lappend groups $group
                g xgroup create $key $group [one_of 0 $ [one_of {*}$ids]] {*}[one_of {} {} "entriesread [rnd 0 100]"]
            }}
            7 {if {$groups ne ""} {g xgroup createconsumer $key [one_of {*}$groups] idle[rnd 0 3]}}
            8 - 9 {if {$groups ne ""} {
                g xreadgroup group [one_of {*}$groups] "c[rnd 0 3]" count [rnd 1 10] {*}[one_of {} {} noack] streams $key >
            }}
            10 {if {$groups ne "" && $ids ne ""} {
                g xack $key [one_of {*}$groups] [one_of {*}$ids]
                g xclaim $key [one_of {*}$groups] "c[rnd 0 5]" 0 [one_of {*}$ids] idle [rnd 0 10000] retrycount [rnd 0 50] {*}[one_of {} force justid]
            }}
            11 {if {[chance 20] && $ids ne ""} {
                switch [rnd 0 2] {
                    0 {g xtrim $key maxlen [one_of = ~] [rnd 5 50]}
                    1 {g xtrim $key minid [one_of {*}$ids]}
                    2 {if {$groups ne ""} {g xgroup setid $key [one_of {*}$groups] [one_of {*}$ids] entriesread [rnd 0 50]}}
                }
            }}
        }
    }
    # One at least of what others lose: a pending entry whose message is gone.
    foreach {at name} {1 a 2 b 3 c} {g xadd $key "[expr {$ms+$at}]-1" name $name}
    g xgroup create $key kept "$ms-9999999"
    g xreadgroup group kept alice count 2 streams $key >
    g xreadgroup group kept noacker noack count 1 streams $key >
    g xdel $key "[expr {$ms+1}]-1"
}
proc make_stream:empty key {
    g xadd $key 5-5 a b
    g xgroup create $key g 0
    g xreadgroup group g c streams $key >
    g xdel $key 5-5
}
proc make_stream:setid key {
    g xadd $key 5-5 a b
    g xadd $key 6-0 a b
    g xdel $key 5-5
    g xsetid $key "[rnd 10 1000]-[rnd 0 9]" entriesadded [rnd 10 1000] maxdeletedid 7-7
}
proc make_stream:never key {
    g xgroup create $key g $ mkstream
    g xgroup createconsumer $key g idle
}
proc make_stream:long key {
    for {set i 1} {$i <= 1500} {incr i} {g xadd $key $i-1 field $i [one_of same other] [bytes [rnd 0 30]]}
    g xgroup create $key g 0
    g xreadgroup group g c count [rnd 100 1000] streams $key >
    for {set i 0} {$i < 300} {incr i} {g xdel $key [rnd 1 1500]-1}
}

proc make_vset {key option dim args} {
    for {set i 0} {$i < [rnd 2 40]} {incr i} {
        set v {}
        for {set j 0} {$j < $dim} {incr j} {lappend v [expr {rand()*2-1}]}
        g vadd $key {*}$args values $dim {*}$v "e$i" $option {*}[one_of {} "setattr {{\"n\": $i, \"s\": \"[string repeat a $i]\"}}"]
    }
    g vrem $key e1
}
proc make_vset:q8 key {make_vset $key q8 [rnd 1 64]}
proc make_vset:bin key {make_vset $key bin [rnd 1 130]}
proc make_vset:f32 key {make_vset $key noquant [rnd 1 64]}
proc make_vset:reduced key {make_vset $key [one_of q8 noquant bin] 40 reduce [rnd 1 39]}

proc make_str:big key {
    g set $key [string repeat [bytes 997] 25000]
    g setrange $key [rnd 30000000 40000000] end
}
proc make_list:big key {g rpush $key a [string repeat [bytes 1000] 9000] b}
proc make_hash:big key {
    for {set i 0} {$i < 20} {incr i} {
        set some {}
        for {set j 0} {$j < 1000} {incr j} {lappend some "field:$i:$j" [string repeat v [rnd 0 40]]}
        g hset $key {*}$some
    }
}

# Past due ones are told by their name. `big`: of megabytes.
proc kinds {pattern {but {*:big}}} {
    set kinds {}
    foreach proc [lsort [info procs make_$pattern]] {
        set kind [string range $proc 5 end]
        if {$kind ne "vset" && ![string match $but $kind]} {lappend kinds $kind}
    }
    return $kinds
}

proc is_due {key} {
    string match *:gone $key
}

# Some values of each of the kinds over the slots, with all sorts of TTLs.
proc generate {n slots kinds {each 2} {ttls {none none far persisted}}} {
    g_begin $n
    foreach kind $kinds {
        for {set i 0} {$i < $each} {incr i} {
            set ttl [one_of {*}$ttls]
            set key [key_in [one_of {*}$slots] "$kind:$i[expr {$ttl eq {gone} ? {:gone} : {}}]"]
            make_$kind $key
            switch $ttl {
                far       {g pexpireat $key [one_of 4000000000000 [expr {[clock milliseconds]+[rnd 10000000 1000000000]}]]}
                persisted {g pexpire $key 1000000; g persist $key}
                gone      {g pexpire $key 1}
            }
        }
    }
    g_end
    # What was to be due in a millisecond is.
    set now [R $n time]
    wait_for_condition 100 1 {[lindex [R $n time] 0]*1000000+[lindex [R $n time] 1] > [lindex $now 0]*1000000+[lindex $now 1]+5000} else {
        fail "the clock of node $n stands"
    }
}

# ---- the whole of what a node knows about its keys ----

# slots_dump, and the bytes of DUMP where they do not depend on the order of a
# hash table; of a key that is past due only what does not delete it.
proc everything {n slots} {
    set keys [keys_in_slots $n $slots]
    set rd [redis_deferring_client -$n]
    $rd client no-touch on; $rd read
    set facts {}
    set live {}
    foreach key $keys {
        $rd debug object $key
        $rd debug digest-value $key
        if {![is_due $key]} {$rd type $key; $rd pexpiretime $key}
    }
    foreach key $keys {
        set about [dict create object [object_about [$rd read]] digest [$rd read]]
        if {![is_due $key]} {
            dict set about type [$rd read]
            dict set about pexpiretime [$rd read]
            lappend live $key
        }
        dict set facts $key $about
    }
    foreach key $live {
        set type [dict get $facts $key type]
        set encoding [lindex [dict get $facts $key object] 0]
        switch $type {
            hash {
                $rd hlen $key
                dict set facts $key hlen [$rd read]
                $rd hkeys $key
                set fields [lsort [$rd read]]
                if {$fields ne ""} {
                    $rd hpexpiretime $key fields [llength $fields] {*}$fields
                    dict set facts $key field_ttls [$rd read]
                }
            }
            stream {
                $rd xinfo stream $key full count 0
                dict set facts $key xinfo [$rd read]
            }
            vectorset {
                $rd vinfo $key
                set info [$rd read]
                foreach field {hnsw-max-node-uid vset-uid} {dict unset info $field}
                dict set facts $key info $info
                $rd vrandmember $key 100000
                foreach member [lsort [$rd read]] {
                    $rd vemb $key $member raw
                    $rd vgetattr $key $member
                    $rd vlinks $key $member withscores
                    $rd vsim $key ele $member count 5 withscores truth
                    dict set facts $key $member:raw [$rd read]
                    dict set facts $key $member:attr [$rd read]
                    # A loaded graph has the same links in another order.
                    set links {}
                    foreach layer [$rd read] {lappend links [lsort -stride 2 $layer]}
                    dict set facts $key $member:links $links
                    dict set facts $key $member:sim [lsort [dict values [$rd read]]]
                }
            }
        }
        if {$encoding ne "hashtable" && $type ne "vectorset"} {
            $rd dump $key
            set value [$rd read]
            # It begins with the least expiry time, which is a guess from below
            # until the value is loaded again.
            if {$encoding eq "listpackex"} {set value [string range $value 9 end-8]}
            dict set facts $key dump $value
        }
    }
    $rd close
    return $facts
}

# Whatever of it does not depend on how a value is kept is to be equal; the bytes
# of DUMP when it is kept in the same encoding. `but`: what differs by right.
proc assert_same_values {expected actual {but {}}} {
    foreach {facts other} [list $expected $actual $actual $expected] {
        dict for {key about} $facts {
            if {![dict exists $other $key]} {
                fail "key $key is [expr {$facts eq $expected ? {missing} : {there, expected none}}] ($about)"
            }
        }
    }
    dict for {key about} $expected {
        set is [dict get $actual $key]
        set leave [concat object $but]
        if {[lindex [dict get $about object] 0] ne [lindex [dict get $is object] 0]} {
            lappend leave dump
            # In a listpack a score of -0 is 0, as anywhere in Redis.
            if {[string match *zset:* $key]} {lappend leave digest}
        }
        foreach field [lsort -unique [concat [dict keys $about] [dict keys $is]]] {
            if {$field in $leave} continue
            foreach {name facts} [list was $about now $is] {
                set $name [expr {[dict exists $facts $field] ? [dict get $facts $field] : {(none)}}]
            }
            if {$was ne $now} {
                fail "key $key, $field differs ([dict get $about object], now [dict get $is object]):\nexpected [string range $was 0 1000]\nis       [string range $now 0 1000]"
            }
        }
    }
}

proc without_due {facts} {
    dict filter $facts script {key -} {expr {![is_due $key]}}
}

proc counts {n slots} {
    set counts {}
    foreach slot $slots {lappend counts [R $n cluster countkeysinslot $slot]}
    foreach field {keys expires} {lappend counts $field [keyspace_field $n $field]}
    return $counts
}

# The histograms of sizes, a line for each type.
proc keysizes {n} {
    lsort [regexp -all -inline {db0_\S+} [R $n info keysizes]]
}

# How upstream's own reader of a value (RESTORE of what the source's DUMP gave)
# keeps it at node n: the same value in the same encoding, to the byte, as what
# arrived.
proc assert_kept_as_restored {n dumps} {
    dict for {key value} $dumps {
        set copy "$key:copy"
        R $n restore $copy [expr {[R $n pexpiretime $key] > 0 ? 100000000 : 0}] $value
        foreach k [list $key $copy] {
            set kept($k) [list [object_about [R $n debug object $k]] [R $n debug digest-value $k]]
        }
        R $n del $copy
        if {$kept($key) ne $kept($copy)} {fail "$key is kept as $kept($key), RESTORE keeps it as $kept($copy)"}
    }
}

# Encoding and size, and what DEBUG OBJECT tells of the nodes of a list.
proc object_about {object} {
    regsub {.* encoding:} $object {} object
    regsub { lru:.* lru_seconds_idle:\d+} $object {} object
    return $object
}

# Move the slots and compare everything with before. `but`: what differs by right.
proc check_move {from to slots {but {}}} {
    set before [everything $from $slots]
    set counts [counts $from $slots]
    set sizes [keysizes $from]
    set dumps {}
    dict for {key -} [without_due $before] {dict set dumps $key [R $from dump $key]}
    # Reading has deleted nothing.
    assert_equal $counts [counts $from $slots]

    move_slots $from $to {*}[range_of $slots]

    assert_same_values $before [everything $to $slots] $but
    assert_equal $counts [counts $to $slots]
    assert_equal $sizes [keysizes $to]
    assert_equal [lrepeat [llength $slots] 0] [lrange [counts $from $slots] 0 [llength $slots]-1]
    assert_equal "" [keysizes $from]
    assert_kept_as_restored $to $dumps

    set at_target [without_due [everything $to $slots]]
    # Not to be compared with the source's, where hashes count until it is seen
    # that they have no field TTL any more.
    set subexpiry [keyspace_field $to subexpiry]
    R $to debug reload
    assert_same_values $at_target [everything $to $slots]
    if {[dict size $at_target] == [dict size $before]} {
        assert_equal $sizes [keysizes $to]
        assert_equal $counts [counts $to $slots]
        assert_equal $subexpiry [keyspace_field $to subexpiry]
    }
    return $before
}

proc range_of {slots} {
    list [lindex $slots 0] [lindex $slots end]
}

# ---- limits of encodings ----

set ::limits {
    hash-max-listpack-entries 512 {0 1 5 64 1000}
    hash-max-listpack-value   64  {1 16 200}
    set-max-intset-entries    512 {0 16 300 5000}
    set-max-listpack-entries  128 {0 10 50 500}
    set-max-listpack-value    64  {1 8 200}
    zset-max-listpack-entries 128 {0 10 50 400}
    zset-max-listpack-value   64  {1 8 200}
    list-max-listpack-size    -2  {-1 -3 -5 1 5 1000}
    list-compress-depth       0   {1 2 10}
    stream-node-max-entries   100 {1 3 0}
    stream-node-max-bytes     4096 {0 50 500}
    hll-sparse-max-bytes      3000 {0 100 16000}
}

proc default_limits {n} {
    foreach {name value -} $::limits {R $n config set $name $value}
}

proc random_limits {n} {
    set chosen {}
    foreach {name value others} $::limits {
        if {[chance 60]} {set value [one_of {*}$others]}
        R $n config set $name $value
        lappend chosen $name $value
    }
    return $chosen
}

# ---- modules for the tests, from upstream's own tests ----

proc build_test_modules {args} {
    set targets {}
    foreach name $args {lappend targets $name.so}
    set log [tmpfile modules]
    if {[catch {exec make -C tests/modules {*}$targets >& $log}]} {fail "the test modules do not build: [exec cat $log]"}
}

proc load_test_module {n name} {
    R $n module load [file normalize tests/modules/$name.so]
}

set ::slots {0 1 2 3}

start_cluster 3 0 {tags {external:skip cluster}} {
    set id2 [node_id 2]

    test "Random values of every kind are the same at the target, to the byte" {
        seeded {
            fresh
            generate 0 $::slots [kinds * *due]
            generate 0 $::slots [kinds *:big] 1
            set before [check_move 0 2 $::slots]
            # All that is meant to be there is.
            set encodings {}
            dict for {- about} $before {dict set encodings "[dict get $about type]:[lindex [dict get $about object] 0]" 1}
            foreach encoding {
                string:int string:embstr string:raw list:listpack list:quicklist set:intset set:listpack
                set:hashtable zset:listpack zset:skiplist hash:listpack hash:hashtable hash:listpackex
                stream:stream vectorset:raw
            } {
                if {![dict exists $encodings $encoding]} {fail "no value was a $encoding"}
            }
        }
    }

    test "Random values are the same at a target with other limits of the encodings" {
        seeded {
            foreach to {2 1} {
                fresh
                set chosen [list [random_limits 0] [random_limits $to]]
                generate 0 $::slots [kinds *] 1 {none far}
                set failed [catch {check_move 0 $to $::slots dump} error options]
                foreach n [list 0 $to] {default_limits $n}
                if {$failed} {return -options $options "$error\n(limits $chosen)"}
            }
        }
    }

    test "Keys and hash fields that are past due, but still there, arrive and count" {
        seeded {
            fresh
            foreach n {0 2} {R $n debug set-active-expire 0}
            generate 0 $::slots [kinds *] 2 {none far gone gone}
            set gone [llength [lsearch -all -inline -glob [keys_in_slots 0 $::slots] *:gone]]
            assert_morethan $gone 20
            check_move 0 2 $::slots
            assert_equal {} [lsearch -all -inline -glob [keys_in_slots 2 $::slots] *:gone]
            foreach n {0 2} {R $n debug set-active-expire 1}
            # Fields that are due and hashes that have no others.
            wait_for_condition 500 10 {[llength [lsearch -all -inline -glob [keys_in_slots 2 $::slots] *hash:alldue:*]] == 0} else {
                fail "hashes without a field that is not due stay"
            }
            foreach key [lsearch -all -inline -glob [keys_in_slots 2 $::slots] *due:*] {
                wait_for_condition 500 10 {[R 2 hlen $key] == [llength [R 2 hkeys $key]]} else {
                    fail "fields of $key that are due stay"
                }
            }
        }
    }

    test "How often keys were used arrives, with a policy of LFU" {
        seeded {
            fresh
            # With maxmemory, so that no integer is shared.
            foreach n {0 2} {R $n config set maxmemory 4gb maxmemory-policy [one_of allkeys-lfu volatile-lfu] lfu-decay-time 0}
            generate 0 $::slots [kinds *] 1 {none far}
            set freq {}
            foreach key [keys_in_slots 0 $::slots] {
                if {[set f [rnd -50 255]] >= 0} {
                    # RESTORE alone sets it.
                    set ttl [expr {max(0,[R 0 pexpiretime $key])}]
                    R 0 restore $key $ttl [R 0 dump $key] replace absttl freq $f
                    assert_equal $f [R 0 object freq $key]
                }
            }
            R 0 client no-touch on
            foreach key [keys_in_slots 0 $::slots] {lappend freq $key [R 0 object freq $key]}
            assert_morethan [llength [lsort -unique [dict values $freq]]] 15
            R 0 client no-touch off
            move_slots 0 2 0 3
            dict for {key f} $freq {assert_equal $f [R 2 object freq $key] $key}
            R 2 debug reload
            dict for {key f} $freq {assert_equal $f [R 2 object freq $key] $key}
            foreach n {0 2} {R $n config set maxmemory 0 maxmemory-policy noeviction lfu-decay-time 1}
        }
    }

    foreach policy {noeviction allkeys-lru volatile-ttl} {
        test "How long keys were not used arrives, with the policy $policy" {
            seeded {
                fresh
                foreach n {0 2} {R $n config set maxmemory-policy $policy maxmemory 4gb}
                generate 0 $::slots [kinds *] 1 {none far}
                foreach key [keys_in_slots 0 $::slots] {
                    set ttl [expr {max(0,[R 0 pexpiretime $key])}]
                    R 0 restore $key $ttl [R 0 dump $key] replace absttl idletime [one_of 0 [rnd 1 100] [rnd 1000 1000000]]
                }
                set from [clock seconds]
                set idle {}
                foreach key [keys_in_slots 0 $::slots] {
                    # A small integer's object is one for all keys and all threads, unless an
                    # LRU policy has something to evict: it has no time of its own.
                    if {[R 0 object refcount $key] == 2147483647} {assert {$policy ne "allkeys-lru"}; continue}
                    lappend idle $key [R 0 object idletime $key]
                }
                move_slots 0 2 0 3
                dict for {key time} $idle {
                    set now [R 2 object idletime $key]
                    # As long as before and while it moved.
                    if {$now < $time-1 || $now > $time+[clock seconds]-$from+2} {
                        fail "$key was idle for $time s, now [expr {[clock seconds]-$from}] s later for $now s"
                    }
                }
                foreach n {0 2} {R $n config set maxmemory-policy noeviction maxmemory 0}
            }
        }
    }

    test "A string of 512 MB arrives" {
        fresh
        foreach n {0 2} {R $n config set proto-max-bulk-len 600mb}
        R 0 setrange [key_in 0 huge] [expr {512*1024*1024-5}] abcde
        R 0 set [key_in 1 after] it
        set before [everything 0 $::slots]
        move_slots 0 2 0 3
        assert_same_values $before [everything 2 $::slots] dump
        assert_equal abcde [R 2 getrange [key_in 0 huge] -5 -1]
        foreach n {0 2} {R $n config set proto-max-bulk-len 512mb}
    } {} {large-memory}
}

# Modules cannot be unloaded once they have a type: nodes of their own. Node 1 has
# none.
start_cluster 3 0 {tags {external:skip cluster modules}} {
    build_test_modules datatype datatype2
    foreach n {0 2} {
        load_test_module $n datatype
        load_test_module $n datatype2
    }

    # Values of a module that keeps all of it in the value, and of one that keeps
    # most of it beside, under the key's name and the database's number.
    proc fill_modules {n slots} {
        set r [Rn $n]
        foreach slot $slots {
            for {set i 0} {$i < 5} {incr i} {
                $r datatype.set [key_in $slot dt:$i] [rnd -1000 1000] [bytes [rnd 0 5000]]
                $r mem.alloc [key_in $slot mem:$i] [rnd 4 20]
                $r mem.write [key_in $slot mem:$i] [rnd 0 2] "$slot:$i:[rnd 0 100000]"
                $r set [key_in $slot s:$i] x
                if {[chance 30]} {foreach k {dt mem} {$r pexpire [key_in $slot $k:$i] 100000000}}
            }
        }
    }

    proc module_values {n slots} {
        foreach slot $slots {
            for {set i 0} {$i < 5} {incr i} {
                dict set values [key_in $slot dt:$i] [R $n datatype.get [key_in $slot dt:$i]]
                for {set j 0} {$j < 3} {incr j} {
                    dict set values [key_in $slot mem:$i]:$j [R $n mem.read [key_in $slot mem:$i] $j]
                }
            }
        }
        return $values
    }

    test "Values of modules arrive, and the modules can read and write them" {
        seeded {
            fresh
            fill_modules 0 $::slots
            set values [module_values 0 $::slots]
            set before [everything 0 $::slots]
            assert_equal 60 [dict size $before]
            move_slots 0 2 0 3
            assert_same_values $before [everything 2 $::slots]
            assert_equal $values [module_values 2 $::slots]
            R 2 debug reload
            assert_same_values $before [everything 2 $::slots]
            assert_equal $values [module_values 2 $::slots]
            foreach slot $::slots {
                R 2 datatype.set [key_in $slot dt:0] 7 seven
                assert_equal {7 seven} [R 2 datatype.get [key_in $slot dt:0]]
                R 2 mem.free [key_in $slot mem:0]
                R 2 mem.alloc [key_in $slot mem:0] 1
                R 2 mem.write [key_in $slot mem:0] 0 new
                assert_equal new [string trim [R 2 mem.read [key_in $slot mem:0] 0] \0]
            }
        }
    }

    test "Values of modules that come back are those of now, also what the module keeps beside them" {
        seeded {
            fresh
            set key [key_in 1 mem]
            R 0 mem.alloc $key 2
            R 0 mem.write $key 0 old
            move_slots 0 2 0 3
            assert_equal old [string trim [R 2 mem.read $key 0] \0]
            R 2 mem.free $key
            R 2 mem.alloc $key 2
            R 2 mem.write $key 0 new
            move_slots 2 0 0 3
            assert_equal new [string trim [R 0 mem.read $key 0] \0]
            assert_equal PONG [R 2 ping]
        }
    }

    test "Writes of a module during the migration arrive" {
        seeded {
            fresh
            fill_modules 0 $::slots
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 0 3]
            wait_job_state 0 $id streaming
            R 0 mem.alloc [key_in 2 later] 3
            R 0 mem.write [key_in 2 later] 1 block
            R 0 mem.free [key_in 3 mem:1]
            R 0 mem.write [key_in 3 mem:2] 3 changed
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            assert_equal block [string trim [R 2 mem.read [key_in 2 later] 1] \0]
            assert_equal changed [string trim [R 2 mem.read [key_in 3 mem:2] 3] \0]
            R 2 debug reload
            assert_equal block [string trim [R 2 mem.read [key_in 2 later] 1] \0]
        }
    }

    test "A cancelled migration of values of modules leaves nothing at the target, also beside the values" {
        seeded {
            fresh
            fill_modules 0 $::slots
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 0 3]
            wait_job_state 0 $id streaming
            R 0 cluster cancel-slot-migrations id $id
            wait_job_state 2 $id cancelled
            wait_lazyfree_done [Rn 2]
            assert_equal 0 [R 2 dbsize]
            failpoint 0 source_before_cut off
            # What was there would now be taken for what arrives.
            R 0 flushall
            fill_modules 0 $::slots
            set before [everything 0 $::slots]
            set values [module_values 0 $::slots]
            move_slots 0 2 0 3
            assert_same_values $before [everything 2 $::slots]
            assert_equal $values [module_values 2 $::slots]
        }
    }

    test "A value of a module that the target does not have fails the job before the hand-off, with type and slot named" {
        seeded {
            fresh
            foreach {command type} {
                {datatype.set % 1 x} test___dt
                {mem.alloc % 1}      mem_alloc
            } {
                R 0 flushall
                fill_strings 0 {0 1 2 3} 20
                R 0 {*}[lreplace $command 1 1 [key_in 2 value]]
                set before [everything 0 $::slots]
                set id [migrate 0 1 0 3]
                foreach n {0 1} {
                    wait_job_state $n $id failed
                    assert_match "*$type*" [job_field $n $id last-error]
                    assert_match "*slot 2*" [job_field $n $id last-error]
                }
                assert {![dict exists [job_field 0 $id phase-ms] fenced]}
                assert_same_values $before [everything 0 $::slots]
                assert_equal 0 [slot_owner 1 2]
                assert_equal 0 [R 1 dbsize]
            }
        }
    }

    test "A write of a module that the target does not have fails the job, with the command named" {
        seeded {
            fresh
            fill_strings 0 {0 1 2 3} 20
            failpoint 0 source_before_cut pause
            set id [migrate 0 1 0 3]
            wait_job_state 0 $id streaming
            R 0 mem.alloc [key_in 2 value] 2
            R 0 mem.write [key_in 2 value] 1 block
            foreach n {0 1} {
                wait_job_state $n $id failed
                assert_match "*mem.alloc*" [job_field $n $id last-error]
                assert_match "*slot 2*" [job_field $n $id last-error]
            }
            failpoint 0 source_before_cut off
            assert_equal block [string trim [R 0 mem.read [key_in 2 value] 1] \0]
            assert_equal 0 [slot_owner 1 2]
            assert_equal 0 [R 1 dbsize]
        }
    }
}

start_cluster 3 0 {tags {external:skip cluster modules}} {
    test "A module that listens for keys that go hears of none that arrives, until it is served" {
        fresh
        build_test_modules hooks
        load_test_module 2 hooks
        foreach name {overwritten deleted renamed} {R 0 set [key_in 1 $name] 1}
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 0 3]
        wait_job_state 2 $id following
        R 0 set [key_in 1 overwritten] 2
        R 0 del [key_in 1 deleted]
        R 0 rename [key_in 1 renamed] [key_in 1 overwritten]
        R 0 set [key_in 1 last] 1
        set before [slots_dump 0 1]
        wait_for_condition 500 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "[job 0 $id]"}
        foreach name {overwritten deleted renamed} {assert_equal 0 [R 2 hooks.event_count key-info-[key_in 1 $name]]}
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_same_dump $before [slots_dump 2 1]
        R 2 del [key_in 1 overwritten]
        assert_equal 1 [R 2 hooks.event_count key-info-[key_in 1 overwritten]]
    }
}
