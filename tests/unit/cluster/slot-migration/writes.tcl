# Live writes by every write command of the server, at every phase of a
# migration, arrive at the target as they were made at the source.
#
# ::write_templates has invocations of each write command of the server. Words
# with a % are drawn: keys from small pools, one for each kind of value, in the
# slot of the invocation; members, numbers and times that make most invocations
# do something. write_decks runs all of them in a random order, alone or together
# in MULTI, a script or a function, at the slots' owner and on an unpatched server
# that is alone; all replies must be equal, and so must be what is left.
#
# Everything random comes from one seed, see seed_writes.

source tests/support/slot_migration.tcl

# ---- templates ----

# One invocation a line. "~": its effect is random or depends on the clock, so it
# is for the slots that are not compared with the unpatched server.
set ::write_templates {
    append %str %v
    bitfield %bits set u8 %off %n
    bitfield %bits incrby i5 %off %i
    bitfield %bits overflow sat incrby u2 #1 3 get u4 0
    bitfield %bits overflow fail incrby i8 0 100
    bitop and %bits %bits %bits
    bitop or %bits %bits %bits
    bitop xor %bits %bits %bits
    bitop not %bits %bits
    blmove %list %list left right 0.01
    blmpop 0.01 2 %list %list left count 2
    blpop %list %list %list 0.01
    brpop %list %list %list 0.01
    brpoplpush %list %list 0.01
    bzmpop 0.01 2 %zset %zset max count 2
    bzpopmax %zset %zset %zset 0.01
    bzpopmin %zset %zset %zset 0.01
    copy %copy %copy
    copy %copy %copy replace
    copy %copy %copy db 0 replace
    decr %num
    decrby %num %n
    del %any
    del %any %any %any
    expire %any %ttl
    expire %any %ttl nx
    expire %any %ttl xx
    expire %any %ttl gt
    expire %any %ttl lt
    expire %any -1
    expireat %any %at
    expireat %any %at lt
    expireat %any 1
    geoadd %geo %lon %lat %m
    geoadd %geo nx %lon %lat %m %lon %lat %m
    geoadd %geo xx ch %lon %lat %m
    georadius %geo 15 37 500 km store %zset
    georadius %geo 15 37 900 km count 2 asc storedist %zset
    georadiusbymember %geo %m 500 km store %geo
    georadiusbymember %geo %m 500 km storedist %zset
    geosearchstore %geo %geo fromlonlat 15 37 byradius 900 km
    geosearchstore %zset %geo frommember %m bybox 900 900 km asc count 3 storedist
    getdel %str
    getex %str ex %ttl
    getex %str px %pttl
    getex %str exat %at
    getex %str pxat %pat
    getex %str persist
    getset %str %v
    hdel %hash %f
    hdel %hash %f %f %f
    hexpire %hash %ttl fields 2 %f %f
    hexpire %hash %ttl nx fields 1 %f
    hexpire %hash %ttl xx fields 1 %f
    hexpire %hash %ttl gt fields 2 %f %f
    hexpire %hash %ttl lt fields 2 %f %f
    hexpire %hash 0 fields 1 %f
    hexpireat %hash %at fields 2 %f %f
    hexpireat %hash 1 fields 1 %f
    hgetdel %hash fields 2 %f %f
    hgetex %hash ex %ttl fields 1 %f
    hgetex %hash px %pttl fields 2 %f %f
    hgetex %hash exat %at fields 1 %f
    hgetex %hash pxat %pat fields 1 %f
    hgetex %hash persist fields 2 %f %f
    hincrby %hash counter %i
    hincrbyfloat %hash float %fl
    hmset %hash %f %v %f %v
    hpersist %hash fields 3 %f %f %f
    hpexpire %hash %pttl fields 2 %f %f
    hpexpire %hash %pttl gt fields 2 %f %f
    hpexpireat %hash %pat fields 2 %f %f
    hpexpireat %hash %pat lt fields 2 %f %f
    ~hpexpire %hash %soon fields 2 %f %f
    hset %hash %f %v
    hset %hash %f %v %f %v %f %v %f %v
    hsetex %hash ex %ttl fields 2 %f %v %f %v
    hsetex %hash fnx px %pttl fields 1 %f %v
    hsetex %hash fxx exat %at fields 1 %f %v
    hsetex %hash pxat %pat fields 1 %f %v
    hsetex %hash keepttl fields 1 %f %v
    ~hsetex %hash px %soon fields 1 %f %v
    hsetnx %hash %f %v
    incr %num
    incrby %num %i
    incrbyfloat %float %fl
    linsert %list before %e %e
    linsert %list after %e %e
    lmove %list %list left left
    lmove %list %list right left
    lmpop 2 %list %list right count 2
    lpop %list
    lpop %list 2
    lpush %list %e
    lpush %nums %n %i %n %i
    lpushx %list %e %e
    lrem %list 1 %e
    lrem %list -1 %e
    lset %list 0 %e
    ltrim %list 0 4
    mset %str %v %str %v
    mset %str %long %str %long %str %long
    msetnx %str %v %str %v
    persist %any
    pexpire %any %pttl
    pexpire %any %pttl gt
    ~pexpire %any %soon
    pexpireat %any %pat
    pexpireat %any %pat nx
    pexpireat %any 1
    pfadd %hll %e %e %e
    pfadd %hll
    pfcount %hll
    pfdebug todense %hll
    pfmerge %hll %hll %hll
    psetex %str %pttl %v
    ~psetex %str %soon %v
    rename %key %key
    renamenx %key %key
    restore %copy 0 %dump replace
    restore %copy %pttl %dump replace
    restore %copy %pat %dump replace absttl
    restore %copy %pttl %dump replace idletime 100
    restore %copy 0 %dump freq 7 replace
    restore %copy 0 %dump
    ~restore %copy %soon %dump replace
    restore-asking %copy 0 %dump replace
    rpop %list
    rpop %list 3
    rpoplpush %list %list
    rpush %list %e
    rpush %list %e %long %e %v
    rpushx %list %e
    sadd %set %m
    sadd %set %m %m %n %v
    sdiffstore %set %set %set
    set %str %v
    set %str %v ex %ttl
    set %str %v px %pttl
    set %str %v exat %at
    set %str %v pxat %pat
    set %str %v keepttl
    set %str %v nx
    set %str %v xx get
    set %str %v nx get px %pttl
    ~set %str %v px %soon
    setbit %bits %off 1
    setex %str %ttl %v
    setnx %str %v
    setrange %str 3 %v
    sinterstore %set %set %set
    smove %set %set %m
    sort %nums store %nums
    sort %nums desc limit 0 5 store %nums
    sort %list alpha store %list
    sort %set alpha desc store %list
    sort %zset by nosort get # store %list
    sort %nums by %tagnum:* get # get %tagnum:* store %list
    ~sort %set by nosort store %list
    ~spop %set
    ~spop %set 2
    srem %set %m %m
    sunionstore %set %set %set
    unlink %any
    unlink %any %any
    vadd %vset values 3 %x %x %x %new
    vadd %vset values 3 %x %x %x %new setattr {{"a":%n}} ef 50 m 8
    vadd %vset values 3 %x %x %x %new cas
    vadd %vset fp32 %blob %new
    vadd %vsetf values 3 %x %x %x %new noquant
    vadd %vsetb values 3 %x %x %x %new bin
    vadd %vsetr reduce 2 values 3 %x %x %x %new
    vrem %vset %old
    vrem %vset %old
    vsetattr %vset %old {{"b":"%e"}}
    vsetattr %vset %old {}
    xack %stream %g %id %id %id %id %id %id
    xadd %stream %newid f %v
    xadd %stream %newms-* f %v g %e
    xadd %stream nomkstream maxlen 30 %newid f %v
    xadd %stream maxlen ~ 20 limit 100 %newid f %v
    xadd %stream minid = %id %newid f %v
    ~xadd %loose * f %v
    ~xadd %loose maxlen 10 * f %v
    xautoclaim %stream %g %d 0 0 count 3
    xautoclaim %stream %g %d 0 %id justid
    xclaim %stream %g %d 0 %id %id %id
    xclaim %stream %g %d 0 %id %id justid
    xclaim %stream %g %d 0 %id %id force idle 1000 retrycount %n
    xclaim %stream %g %d 0 %id force time 1000000 lastid %id
    xdel %stream %id %id
    xgroup create %stream %g 0 mkstream
    xgroup create %stream %g 0 mkstream
    xgroup create %stream %g $ mkstream
    xgroup create %stream %g %id entriesread 3
    xgroup createconsumer %stream %g %c
    xgroup delconsumer %stream %g %c
    xgroup delconsumer %stream %g %d
    xgroup destroy %stream %g
    xgroup setid %stream %g 0
    xgroup setid %stream %g %id entriesread 2
    xreadgroup group %g %d count 3 streams %stream >
    xreadgroup group %g %d count 3 streams %stream >
    xreadgroup group %g %d count 2 streams %stream %stream > >
    xreadgroup group %g %d count 2 noack streams %stream >
    xreadgroup group %g %d block 10 count 3 streams %stream >
    xadd %history %newid f %v
    xgroup create %history g 0 mkstream
    xreadgroup group g %d count 2 streams %history >
    xreadgroup group g %d count 3 streams %history 0
    xsetid %stream %newid
    xsetid %stream %newid entriesadded 1000000 maxdeletedid %id
    xtrim %stream maxlen 8
    xtrim %stream maxlen ~ 10 limit 50
    xtrim %stream minid %id
    zadd %zset %s %m
    zadd %zset %s %m %s %m %s %m
    zadd %zset nx %s %m %s %m
    zadd %zset xx ch %s %m %s %m
    zadd %zset gt ch %s %m %s %m
    zadd %zset lt %s %m
    zadd %zset incr %s %m
    zdiffstore %zset 2 %zset %zset
    zincrby %zset %s %m
    zinterstore %zset 2 %zset %zset weights 2 -1 aggregate max
    zinterstore %zset 2 %zset %set
    zmpop 2 %zset %zset min count 2
    zpopmax %zset
    zpopmin %zset 2
    zrangestore %zset %zset 0 3
    zrangestore %zset %zset -50 50 byscore limit 0 4
    zrangestore %lex %lex + - bylex rev
    zrem %zset %m %m
    zadd %lex 0 %m 0 %m 0 %m
    zremrangebylex %lex [c (f
    zremrangebyrank %zset 0 0
    zremrangebyscore %zset 20 (60
    zunionstore %zset 2 %zset %zset aggregate min
    zunionstore %zset 3 %zset %set %geo weights 1 2 0
}

# Write commands without a template, and why.
set ::write_exceptions {
    flushall            "not of a slot; tests of its own"
    flushdb             "not of a slot; tests of its own"
    function|delete     "not of a slot; a test of its own"
    function|flush      "not of a slot; a test of its own"
    function|load       "not of a slot; a test of its own"
    function|restore    "not of a slot; a test of its own"
    migrate             "needs another server; a test of its own"
    move                "refused in cluster mode: one database"
    swapdb              "refused in cluster mode: one database"
}

set ::write_pools {
    str 4 num 2 float 2 bits 2 list 3 nums 2 set 3 zset 3 lex 1 geo 2 hash 3 stream 2
    history 1 loose 1 hll 2 vset 1 vsetf 1 vsetb 1 vsetr 1
}

# A list of {name words random line} in the order of the table.
proc write_templates {} {
    set templates {}
    foreach line [split [string trim $::write_templates] \n] {
        set line [string trim $line]
        set random [string match ~* $line]
        set words [string trimleft $line ~]
        set name [lindex $words 0]
        if {$name eq "xgroup"} {set name $name|[lindex $words 1]}
        lappend templates [list $name $words $random $line]
    }
    return $templates
}

# All commands and subcommands of the server that have this flag.
proc commands_with_flag {r flag} {
    set names {}
    set waiting [$r command]
    while {[llength $waiting]} {
        set deeper {}
        foreach info $waiting {
            if {$flag in [lindex $info 2]} {lappend names [string tolower [lindex $info 0]]}
            lappend deeper {*}[lindex $info 9]
        }
        set waiting $deeper
    }
    lsort $names
}

# ---- randomness ----

# All that follows from one number: SLOTMIG_SEED of the environment, or the clock.
proc seed_writes {add} {
    if {![info exists ::writes_seed]} {
        set ::writes_seed [expr {[info exists ::env(SLOTMIG_SEED)] ? $::env(SLOTMIG_SEED) : [clock milliseconds] % 1000000}]
        puts "SLOTMIG_SEED=$::writes_seed"
    }
    set ::writes_random [expr {$::writes_seed * 1000 + $add}]
    rnd 1
    rnd 1
}

proc rnd {below} {
    set ::writes_random [expr {($::writes_random * 6364136223846793005 + 1442695040888963407) & 0xffffffffffffffff}]
    expr {($::writes_random >> 33) % $below}
}

proc pick {list} {
    lindex $list [rnd [llength $list]]
}

proc shuffled {list} {
    for {set i [llength $list]} {$i > 1} {} {
        set j [rnd $i]
        incr i -1
        set x [lindex $list $i]
        lset list $i [lindex $list $j]
        lset list $j $x
    }
    return $list
}

# ---- one invocation ----

# Members of the zsets `lex` have one score, as the commands by lex demand.
#
# Times are multiples of this many ms from ::writes_start, so that two servers
# that run a command a moment apart can be compared.
set ::time_unit 1000000

proc write_key {slot kind} {
    key_in $slot $kind:[rnd [dict get $::write_pools $kind]]
}

# The words of a template with all that is random in it drawn. The variable
# named keysvar gets the keys.
proc draw_write {words slot keysvar} {
    upvar $keysvar keys
    set kind [pick [dict keys $::write_pools]]
    set copy [pick {str num float bits list nums set zset geo hash stream hll}]
    set argv {}
    foreach word $words {
        if {[string first % $word] == -1} {
            lappend argv $word
            continue
        }
        set what [string range $word 1 end]
        if {[dict exists $::write_pools $what] || $what in {any key copy}} {
            if {$what eq "key"} {set what $kind} elseif {$what eq "copy"} {set what $copy}
            # Now and then a key of another kind.
            if {$what eq "any" || [rnd 70] == 0} {set what [pick [dict keys $::write_pools]]}
            lappend argv [write_key $slot $what]
            lappend keys [lindex $argv end]
            continue
        }
        set ahead [expr {$::time_unit * (1+[rnd 1000000])}]
        switch $word {
            %v     {lappend argv [pick [list a "" 17 -3 "some text" 3.5 "\x00\r\n\xff$\x80" [string repeat xyz 30]]]}
            %long  {lappend argv [string repeat [pick {abcd 0123}] 5000]}
            %e     {lappend argv [pick {a b c d 1 2 -70000}]}
            %m     {lappend argv [pick {a b c d e f}]}
            %f     {lappend argv [pick {f0 f1 f2 f3 f4}]}
            %g     {lappend argv [pick {g h}]}
            %c     {lappend argv [pick {alice bob}]}
            %d     {lappend argv [pick {carol dave}]}
            %i     {lappend argv [expr {[rnd 41]-20}]}
            %n     {lappend argv [expr {1+[rnd 4]}]}
            %s     {lappend argv [pick {1 2 50 -7.25 0.1 1e10 3}]}
            %x     {lappend argv [expr {([rnd 200]-100)/100.0}]}
            %fl    {lappend argv [pick {0.1 -2.5 3 1e3}]}
            %off   {lappend argv [pick {0 5 17 100 999}]}
            %lon   {lappend argv [expr {10+[rnd 100]/10.0}]}
            %lat   {lappend argv [expr {35+[rnd 50]/10.0}]}
            %blob  {lappend argv [binary format r3 [list [expr {[rnd 9]/9.0}] 0.5 1]]}
            %ttl   {lappend argv [expr {$ahead/1000}]}
            %pttl  {lappend argv $ahead}
            %at    {lappend argv [expr {($::writes_start+$ahead)/1000}]}
            %pat   {lappend argv [expr {$::writes_start+$ahead}]}
            %soon  {lappend argv [expr {1+[rnd 20]}]}
            %new   {lappend argv e[incr ::writes_id($slot)]}
            %old   {lappend argv e[expr {max(1,$::writes_id($slot)-[rnd 25])}]}
            %newid {lappend argv [incr ::writes_id($slot)]-1}
            %id    {lappend argv [expr {max(1,$::writes_id($slot)-[rnd 20])}]-1}
            %dump  {lappend argv [dict get $::write_dumps $copy]}
            default {
                lappend argv [string map [list %newms [incr ::writes_id($slot)] %tag "{[slot_tag $slot]}" \
                    %n [rnd 9] %e [pick {x y}]] $word]
            }
        }
    }
    return $argv
}

# ---- a server of upstream's that is alone ----

# Run the body beside an unpatched node that has all slots, its port in the
# caller's variable `vanilla_port`.
proc with_lone_vanilla {body} {
    upvar vanilla_port vanilla_port
    set program ../vanilla/src/redis-server
    if {![file executable $program]} {
        fail "no unpatched server at [file normalize $program]: run make vanilla"
    }
    set vanilla_port [find_available_port $::baseport $::portcount]
    set dir [file normalize [tmpdir vanilla]]
    set pid [exec $program --port $vanilla_port --dir $dir --cluster-enabled yes --enable-debug-command yes \
        --save "" --logfile $dir/log &]
    send_data_packet $::test_server_fd server-spawned $pid
    set failed [catch {
        wait_for_condition 200 20 {![catch {set r [redis 127.0.0.1 $vanilla_port]; $r ping}]} else {
            fail "the unpatched server does not start"
        }
        $r cluster addslotsrange 0 16383
        wait_for_condition 500 20 {[getInfoProperty [$r cluster info] cluster_state] eq "ok"} else {
            fail "the unpatched server does not serve its slots"
        }
        $r close
        uplevel 1 $body
    } error options]
    catch {exec kill -9 $pid}
    send_data_packet $::test_server_fd server-killed $pid
    if {$failed} {return -options $options $error}
}

# ---- the run ----

# ::writes: node      the number of the slots' owner, changed by MOVED
#           c:N       a deferring client of node N
#           vanilla   one of the unpatched server, "" without
#           same, own the slots that are compared with it, and those that are not
#           port:PORT the number of the node there
#           ok, wrote dicts: templates that had no error; that changed something
#           measure   is `wrote` to be found out?
#           moved, units, groups  counts
# A run begins with keys of every kind that have fixed contents, both at node n
# and at the unpatched server (port "": without).
proc start_writes {n port same own} {
    array unset ::writes
    array unset ::writes_id
    array set ::writes [list node $n same $same own $own vanilla "" ok {} wrote {} measure 0 moved 0 units 0 groups 0]
    set ::writes_start [expr {[clock milliseconds] / $::time_unit * $::time_unit}]
    foreach slot [concat $same $own] {set ::writes_id($slot) 100}
    for {set i 0} {$i < [llength $::servers]} {incr i} {
        set ::writes(c:$i) [redis_deferring_client -$i]
        set ::writes(port:[node_port $i]) $i
    }
    if {$port ne ""} {set ::writes(vanilla) [redis 127.0.0.1 $port 1]}
    write_unit [list {flushall}] 1
    foreach name [concat {vanilla} [lmap i [lsort [array names ::writes c:*]] {set i}]] {
        set c $::writes($name)
        if {$c eq ""} continue
        $c function load replace $::write_library
        assert_equal writes [$c read]
        # Small, for what trims whole ones.
        $c config set stream-node-max-entries 5
        assert_equal OK [$c read]
    }
    foreach slot [concat $same $own] {
        for {set i 0} {$i < 4} {incr i} {
            foreach command {
                {set str: text} {set num: 10} {set float: 1.5} {set bits: abc} {rpush list: a b c d 1 2} {rpush nums: 3 1 2 10}
                {sadd set: a b c d} {zadd zset: 1 a 2 b 50 c -3 d} {geoadd geo: 13.36 38.11 a 15.08 37.50 b 12 36 c}
                {hset hash: f0 v f1 2 f2 x} {pfadd hll: a b c}
            } {
                set kind [string trimright [lindex $command 1] :]
                if {$i >= [dict get $::write_pools $kind]} continue
                write_unit [list [lreplace $command 1 1 [key_in $slot $kind:$i]]] [expr {$slot in $same}]
            }
        }
        for {set id 80} {$id <= 100} {incr id} {
            foreach key {stream:0 stream:1 history:0} {
                write_unit [list [list xadd [key_in $slot $key] $id-1 f $id]] [expr {$slot in $same}]
            }
        }
    }
    # What RESTORE restores, of fixed content.
    set ::write_dumps {}
    set slot [lindex [concat $same $own] 0]
    set r [redis_client -$n]
    foreach kind {str num float bits list nums set zset geo hash stream hll} {
        dict set ::write_dumps $kind [$r dump [key_in $slot $kind:0]]
    }
    $r close
}

proc end_writes {} {
    foreach name [array names ::writes c:*] {$::writes($name) close}
    if {$::writes(vanilla) ne ""} {$::writes(vanilla) close}
}

# Runs commands that are given as: number of words, words, ...
set ::write_script {
    local replies, i = {}, 1
    while i <= #ARGV do
        local n = tonumber(ARGV[i])
        local reply = redis.pcall(unpack(ARGV, i+1, i+n))
        if type(reply) == 'table' and reply.err then reply = reply.err end
        replies[#replies+1] = reply
        i = i+n+1
    end
    return replies
}
set ::write_library "#!lua name=writes\nredis.register_function('writes', function(KEYS, ARGV) $::write_script end)"

# Send the commands together and read their replies, errors as {error TEXT}.
proc send_all {c commands} {
    foreach argv $commands {$c {*}$argv}
}

proc read_all {c commands} {
    set replies {}
    foreach argv $commands {
        if {[catch {$c read} reply]} {set reply [list error $reply]}
        lappend replies $reply
    }
    return $replies
}

# Run commands that belong together at the slots' owner, all of them again where
# a MOVED sends us; with `both` also at the unpatched server, whose replies must
# be the same. The replies.
proc write_unit {commands both} {
    incr ::writes(units)
    set both [expr {$both && $::writes(vanilla) ne ""}]
    if {$both} {send_all $::writes(vanilla) $commands}
    for {set redirected 0} {1} {incr redirected} {
        set c $::writes(c:$::writes(node))
        send_all $c $commands
        set replies [read_all $c $commands]
        if {![regexp {error \{(MOVED|ASK|TRYAGAIN|CLUSTERDOWN)[^\}]*:(\d+)\}} $replies -> error port]} break
        if {$error ne "MOVED" || $redirected == 50} {fail "redirected $redirected times: $commands: $replies"}
        incr ::writes(moved)
        set ::writes(node) $::writes(port:$port)
    }
    if {$both} {
        set expected [read_all $::writes(vanilla) $commands]
        if {$replies ne $expected} {
            fail "the reply is not upstream's (SLOTMIG_SEED=$::writes_seed): $commands\nexpected $expected\nis       $replies"
        }
    }
    return $replies
}

# One invocation by itself; remembers what became of it.
proc write_single {template} {
    lassign $template name words random line
    set slot [write_slot $random]
    set argv [draw_write $words $slot keys]
    set measure [expr {$::writes(measure) && ![dict exists $::writes(wrote) $line]}]
    if {$measure} {set before [writes_counted]}
    set reply [lindex [write_unit [list $argv] [expr {$slot in $::writes(same)}]] 0]
    if {[lindex $reply 0] ne "error"} {dict incr ::writes(ok) $line}
    if {$measure && [writes_counted] != $before} {dict incr ::writes(wrote) $line}
}

proc writes_counted {} {
    set c $::writes(c:$::writes(node))
    $c info persistence
    getInfoProperty [$c read] rdb_changes_since_last_save
}

proc write_slot {random} {
    set own [expr {$random || ![llength $::writes(same)] || ([llength $::writes(own)] && [rnd 4] == 0)}]
    pick [expr {$own ? $::writes(own) : $::writes(same)}]
}

# Several together, as a transaction, a script or a function.
proc write_group {templates how} {
    incr ::writes(groups)
    set random 0
    foreach template $templates {if {[lindex $template 2]} {set random 1}}
    set slot [write_slot $random]
    set keys {}
    set args {}
    foreach template $templates {
        set argv [draw_write [lindex $template 1] $slot keys]
        lappend commands $argv
        lappend args [llength $argv] {*}$argv
    }
    set keys [lsort -unique $keys]
    switch $how {
        multi {set commands [concat {multi} $commands {exec}]}
        eval {set commands [list [list eval $::write_script [llength $keys] {*}$keys {*}$args]]}
        function {set commands [list [list fcall writes [llength $keys] {*}$keys {*}$args]]}
    }
    write_unit $commands [expr {$slot in $::writes(same)}]
}

# All templates `times` times, or until `enough` (an expression of the caller's).
proc write_decks {times {enough 0}} {
    while {[incr times -1] >= 0} {
        set deck [shuffled [lmap template [write_templates] {
            if {[lindex $template 2] && ![llength $::writes(own)]} continue
            set template
        }]]
        for {set i 0} {$i < [llength $deck]} {incr i} {
            if {$enough ne 0 && [uplevel 1 [list expr $enough]]} return
            write_single [lindex $deck $i]
            if {[rnd 5] == 0} {
                set count [expr {2+[rnd 4]}]
                set group {}
                while {[incr count -1] >= 0} {lappend group [pick $deck]}
                write_group $group [pick {multi eval function}]
            }
        }
    }
}

set ::unlucky {}    ;# template -> phases in which it changed nothing

# Every template is to have changed something at least once; those that had no
# luck get more tries, with others in between.
proc assert_all_wrote {} {
    set templates [write_templates]
    for {set i 0} {$i < 600} {incr i} {
        set missing 0
        foreach template $templates {
            if {[dict exists $::writes(wrote) [lindex $template 3]]} continue
            incr missing
            write_single $template
            # What it needs may be made by commands of its own family, or taken away by any other.
            set family $templates
            if {$i % 2} {set family [lsearch -all -inline -index 0 $templates [string index [lindex $template 0] 0]*]}
            for {set j 0} {$j < 5} {incr j} {write_single [pick $family]}
        }
        if {!$missing} return
    }
    foreach template $templates {
        set line [lindex $template 3]
        if {![dict exists $::writes(ok) $line]} {fail "always an error: $line"}
        # Luck, such as MSETNX of keys that are all there: not in every phase.
        if {![dict exists $::writes(wrote) $line]} {dict incr ::unlucky $line}
    }
}

# ---- what they left behind ----

# Nothing that is due is still to be deleted in these slots of node n.
proc writes_settled {n slots} {
    set r [Rn $n]
    foreach slot $slots {
        foreach key [keys_in_slots $n $slot] {
            switch [$r type $key] {
                none {return 0}
                hash {if {[$r hlen $key] != [llength [$r hkeys $key]]} {return 0}}
                default {
                    set ttl [$r pttl $key]
                    if {$ttl >= 0 && $ttl < 60000} {return 0}
                }
            }
            if {[$r type $key] eq "hash"} {
                foreach ttl [$r hpttl $key fields [$r hlen $key] {*}[$r hkeys $key]] {
                    if {$ttl >= 0 && $ttl < 60000} {return 0}
                }
            }
        }
    }
    return 1
}

proc wait_writes_settled {n slots} {
    wait_for_condition 500 10 {[writes_settled $n $slots]} else {fail "keys or fields do not expire"}
}

# slots_dump without what two copies of a key need not have in common: encodings
# (a key that was loaded has the smallest), the time a consumer was seen (of the
# node that ran the command) and levels of a vector set (drawn by each node).
# Upstream does not propagate, to replicas either: a consumer that comes to be by
# a read or claim of nothing (carol and dave are made in no other way), and the
# counts of entries that XREADGROUP reads again (the keys `history`).
proc writes_dump {n slots} {
    set dump [slots_dump $n $slots]
    dict for {key about} $dump {
        lset about 1 -
        switch [lindex $about 0] {
            stream {
                set info [lindex $about 4]
                dict set info groups [lmap group [dict get $info groups] {
                    dict set group consumers [lmap consumer [dict get $group consumers] {
                        if {[dict get $consumer name] in {carol dave} && [dict get $consumer pel-count] == 0} continue
                        dict set consumer seen-time -
                        dict set consumer active-time -
                    }]
                }]
                lset about 4 $info
                if {[string match *history:* $key]} {set about [lrange $about 0 3]}
            }
            vectorset {set about [regsub {max-level \d+} $about -]}
        }
        dict set dump $key $about
    }
    return $dump
}

# And without the difference of the moments at which two servers ran a command.
proc round_times {dump} {
    dict for {key about} $dump {
        lset about 2 [round_time [lindex $about 2]]
        switch [lindex $about 0] {
            hash {lset about 5 [lmap time [lindex $about 5] {round_time $time}]}
            stream {set about [regsub -all {\m[12]\d{12}\M} $about now]}
        }
        dict set dump $key $about
    }
    return $dump
}

proc round_time {time} {
    expr {$time < $::writes_start ? $time : round(double($time-$::writes_start)/$::time_unit)}
}

# The same keys in the slots `same` as at the unpatched server.
proc assert_as_vanilla {n port} {
    set ours [round_times [writes_dump $n $::writes(same)]]
    # slots_dump goes by the number of a node, counted from the end.
    set servers $::servers
    set ::servers [concat [list [dict create host 127.0.0.1 port $port]] $::servers]
    catch {writes_dump [llength $servers] $::writes(same)} theirs options
    set ::servers $servers
    if {[dict get $options -code]} {return -options $options $theirs}
    assert_morethan [dict size $theirs] 10
    assert_same_dump [round_times $theirs] $ours
}

# ---- the tests ----

# Where a job can be held before its end: phase, node, fail point, state there.
set ::phases {
    "before the snapshot"               0 source_before_fork    waiting
    "while slots are frozen and thawed" 0 source_in_freeze      snapshot
    "while sections are still to come"  2 target_before_section snapshot
    "while the target follows"          0 source_before_cut     streaming
}

# A job of slots 5 to 7 that stands in this phase. Once it goes on it stops
# before the cut, until compare_and_finish.
proc start_held {node point state} {
    failpoint 0 source_before_cut pause
    if {$point eq "source_in_freeze"} {failpoint 0 $point fail 50} else {failpoint $node $point pause}
    set id [migrate 0 2 5 7]
    wait_job_state 0 $id $state
    return $id
}

# All that was written so far arrives.
proc wait_followed {node point id} {
    if {$point ne "source_before_cut"} {failpoint $node $point off}
    wait_job_state 0 $id streaming
    wait_for_condition 1000 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "the target lags: [job 0 $id]"}
}

# The keys of the source just before the hand-off are those of the target after it.
proc compare_and_finish {node point id} {
    wait_followed $node $point $id
    wait_writes_settled 0 {5 6 7}
    set before [writes_dump 0 {5 6 7}]
    failpoint 0 source_before_cut off
    wait_migrated 0 2 $id
    assert_same_dump $before [writes_dump 2 {5 6 7}]
    assert_equal 1 [job_field 0 $id attempt]
    assert_equal 0 [R 0 cluster countkeysinslot 5]
    return $before
}

# A client's flags: b is behind the fence.
proc client_flags {n rd} {
    regexp {flags=(\S+)} [R $n client list id $::client_of($rd)] -> flags
    return $flags
}

# Run one command at node 0 whose copy in the stream is lost or doubled.
proc write_badly {point args} {
    failpoint 0 $point fail
    R 0 {*}$args
    failpoint 0 $point off
}

start_cluster 3 0 {tags {external:skip cluster}} {
with_lone_vanilla {
    test "Every write command of the server is in the table of writes, or left out for a reason" {
        set commands [commands_with_flag [Rn 0] write]
        assert_morethan [llength $commands] 100
        set known [lsort -unique [concat [lmap template [write_templates] {lindex $template 0}] [dict keys $::write_exceptions]]]
        foreach name $commands {
            if {$name ni $known} {fail "the write command $name has no template in this file"}
        }
        foreach name $known {
            if {[llength [lindex [R 0 command info $name] 0]] == 0} {fail "$name is in the table of writes, but no command"}
        }
        foreach name [dict keys $::write_exceptions] {
            if {$name ni $commands} {fail "$name is an exception from the table of writes, but does not write"}
        }
    }

    # A child that takes the snapshot freezes nothing.
    if {[lindex [R 0 config get cluster-slot-migration-snapshot] 1] eq "fork"} {
        set phases {}
        foreach {phase node point state} $::phases {
            if {$point ne "source_in_freeze"} {lappend phases $phase $node $point $state}
        }
        set ::phases $phases
    }

    set add 0
    foreach {phase node point state} $::phases {
        test "Random writes of every kind arrive, $phase" {
            fresh
            seed_writes [incr add]
            start_writes 0 $vanilla_port {5 6} 7
            write_decks 1
            set id [start_held $node $point $state]
            set ::writes(measure) 1
            write_decks 1
            assert_all_wrote
            set ::writes(measure) 0
            assert_equal $state [job_field 0 $id state]
            assert_equal 0 [R 2 dbsize]
            assert_as_vanilla 0 $vanilla_port
            compare_and_finish $node $point $id
            assert_as_vanilla 2 $vanilla_port
            assert_equal 0 $::writes(moved)
            # And they can be written as before.
            write_decks 1
            assert_equal 2 $::writes(node)
            assert_morethan $::writes(moved) 0
            assert_as_vanilla 2 $vanilla_port
            end_writes
        }
    }

    test "Random writes arrive while jobs run freely, from hand-off to hand-off" {
        fresh
        seed_writes [incr add]
        start_writes 0 $vanilla_port {5 6} {}
        write_decks 1
        set moves 0
        foreach {from to} {0 2 2 1 1 0 0 1} {
            set before $::writes(units)
            set id [migrate $from $to 5 7]
            write_decks 20 {[job_ended [job_field $from $id state]]}
            assert_morethan $::writes(units) $before
            wait_migrated $from $to $id
            set enough [expr {$::writes(units)+50}]
            write_decks 1 {$::writes(units) >= $enough}
            assert_equal $to $::writes(node)
            assert_equal [incr moves] $::writes(moved)
            assert_as_vanilla $to $vanilla_port
        }
        end_writes
    }

    test "The comparison finds each command that was lost or doubled" {
        foreach {point commands} {
            source_drops_command {
                {append str:0 x} {incr num:0} {incrbyfloat float:0 1} {setbit bits:0 100 1} {rpush list:0 x} {sadd set:0 x}
                {zincrby zset:0 1 a} {geoadd geo:0 11 36 a} {hset hash:0 f0 changed} {hincrby hash:1 counter 1} {pfadd hll:0 other}
                {xadd stream:0 200-1 f v} {xgroup create stream:1 late 0} {hpexpire hash:2 100000000 fields 1 f0}
                {pexpire str:1 1000000} {vsetattr vset:0 e1 {{"a":2}}}
            }
            source_repeats_command {
                {append str:0 x} {incr num:0} {rpush list:0 x} {lpop list:1} {zincrby zset:0 1 a} {hincrby hash:1 counter 1}
                {setrange str:2 9 x} {spop set:0}
            }
        } {
            fresh
            seed_writes 1
            start_writes 0 "" {} {5 6 7}
            end_writes
            R 0 pexpire [key_in 7 str:1] 5000000
            foreach element {e1 e2} {R 0 vadd [key_in 7 vset:0] values 3 1 0.5 0 $element}
            set id [start_held 0 source_before_cut streaming]
            set written {}
            foreach command $commands {
                set at [expr {[lindex $command 0] eq "xgroup" ? 2 : 1}]
                set key [key_in 7 [lindex $command $at]]
                # These do the same when they are done twice (of SPOP the stream has the SREM).
                if {[lindex $command 0] ni {setrange spop} || $point ne "source_repeats_command"} {lappend written $key}
                write_badly $point {*}[lreplace $command $at $at $key]
            }
            wait_followed 0 source_before_cut $id
            set before [writes_dump 0 {5 6 7}]
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            set after [writes_dump 2 {5 6 7}]
            catch {assert_same_dump $before $after} error
            assert_match "*differs*" $error
            set different {}
            dict for {key about} $before {if {$about ne [dict get $after $key]} {lappend different $key}}
            assert_equal [lsort $written] [lsort $different] $point
        }
    }

    test "A deck of random writes of which each is lost does not pass" {
        fresh
        seed_writes [incr add]
        start_writes 0 "" {} {5 6 7}
        failpoint 0 source_drops_command fail
        set id [start_held 0 source_before_cut streaming]
        write_decks 1
        end_writes
        assert_error "*" {compare_and_finish 0 source_before_cut $id}
    }

    foreach {phase node point state} $::phases {
        test "Blocked clients that are served $phase: what they took and pushed arrives" {
            fresh
            foreach name {group reader} {
                R 0 xgroup create [key_in 5 $name] g $ mkstream
            }
            set blocked {}
            foreach {name command reply} {
                l1 {blpop % 0}                                  {% a}
                l2 {brpop % 0}                                  {% c}
                l3 {blmove % {%to} left right 0}                a
                l4 {brpoplpush % {%to} 0}                       c
                l5 {blmpop 0 1 % left count 2}                  {% {a b}}
                l6 {blmove % % right left 0}                    c
                z1 {bzpopmin % 0}                               {% a 1}
                z2 {bzpopmax % 0}                               {% c 3}
                z3 {bzmpop 0 1 % max count 2}                   {% {{c 3} {b 2}}}
                group {xreadgroup group g alice block 0 streams % >}    {{% {{7-7 {f v}}}}}
                reader {xread block 0 streams % $}              {{% {{7-7 {f v}}}}}
                never {blpop % 0}                               {MOVED 5 *}
            } {
                set key [key_in 5 $name]
                lappend blocked $key [string map [list % [list $key]] $reply] [send_command 0 {*}[lmap word $command {string map [list % $key] $word}]]
            }
            wait_for_blocked_clients_count 12
            set id [start_held $node $point $state]
            foreach {key reply rd} $blocked {
                switch -glob $key {
                    *l? {R 0 rpush $key a b c}
                    *z? {R 0 zadd $key 1 a 2 b 3 c}
                    *never continue
                    default {R 0 xadd $key 7-7 f v}
                }
                assert_equal $reply [$rd read] $key
                $rd close
            }
            assert_equal $state [job_field 0 $id state]
            set before [compare_and_finish $node $point $id]
            assert_equal 13 [dict size $before]
            assert_equal {b c} [R 2 lrange [key_in 5 l1] 0 -1]
            assert_equal {c a b} [R 2 lrange [key_in 5 l6] 0 -1]
            assert_equal c [R 2 lrange [key_in 5 l4]to 0 -1]
            assert_error [lindex $blocked end-1] {[lindex $blocked end] read}
            [lindex $blocked end] close
        }

        test "Keys and fields that expire $phase are gone at the target" {
            fresh
            R 2 debug set-active-expire 0
            R 0 debug set-active-expire 0
            set make {{when} {
                foreach slot {5 6 7} {
                    for {set i 0} {$i < 10} {incr i} {
                        set name $when:$i
                        R 0 set [key_in $slot key:$name] x px 20
                        R 0 hset [key_in $slot hash:$name] f v g w
                        R 0 hpexpire [key_in $slot hash:$name] 20 fields 1 f
                        R 0 hsetex [key_in $slot whole:$name] px 20 fields 1 f v
                    }
                }
            }}
            apply $make early
            set id [start_held $node $point $state]
            apply $make late
            wait_for_condition 500 10 {[R 0 pttl [key_in 7 key:late:9]] == -2 &&
                [R 0 hpttl [key_in 7 whole:late:9] fields 1 f] eq -2} else {fail "nothing expires"}
            # Some by whoever comes across them, the others by the cycles.
            foreach slot {5 6 7} {foreach when {early late} {foreach i {0 1 2 3} {
                assert_equal "" [R 0 get [key_in $slot key:$when:$i]]
                assert_equal 1 [R 0 incr [key_in $slot key:$when:$i]]
                assert_equal 1 [R 0 hsetnx [key_in $slot hash:$when:$i] f again]
                assert_equal 1 [R 0 hset [key_in $slot whole:$when:$i] h again]
            }}}
            R 0 debug set-active-expire 1
            # 3 slots, early and late: 10 hashes, 4 keys and 4 hashes made again.
            wait_for_condition 500 10 {[R 0 dbsize] == 3*2*18 && [keyspace_field 0 subexpiry] == 0} else {
                fail "not all expires: [R 0 info keyspace]"
            }
            set before [compare_and_finish $node $point $id]
            assert_equal 108 [dict size $before]
            assert_equal 108 [R 2 dbsize]
            assert_equal 0 [keyspace_field 2 expires]
            assert_equal 0 [keyspace_field 2 subexpiry]
        }

        test "Keys that the source evicts $phase are gone at the target" {
            fresh
            fill_strings 0 {5 6 7} 1500 1000
            R 0 config set maxmemory-policy allkeys-lru
            set id [start_held $node $point $state]
            R 0 config set maxmemory [expr {[status [Rn 0] used_memory]-600000}]
            set i 0
            while {[status [Rn 0] evicted_keys] < 200 && $i < 1000} {
                R 0 set [key_in [expr {5+$i%3}] new:[incr i]] [string repeat v 1000]
            }
            R 0 config set maxmemory 0
            R 0 config set maxmemory-policy noeviction
            set left [R 0 dbsize]
            assert_lessthan $left [expr {1500+$i}]
            R 0 config resetstat
            assert_equal $state [job_field 0 $id state]
            compare_and_finish $node $point $id
            assert_equal $left [R 2 dbsize]
        }
    }

    test "Writes to keys and fields whose time comes before the target applies them arrive" {
        fresh
        seed_writes [incr add]
        start_writes 0 "" {} {5 6 7}
        R 0 debug set-active-expire 0
        set id [start_held 2 target_before_section snapshot]
        set number 0
        foreach template [write_templates] {
            foreach slot {5 6 7} {
                set keys {}
                set argv [draw_write [lindex $template 1] $slot keys]
                incr number
                set argv [lmap word $argv {expr {$word in $keys ? "$word:$number" : $word}}]
                # Each key it names has a few ms left; or the fields of a hash in
                # slot 5 have, and of one that is a hash table in slot 6.
                foreach key $keys {
                    regexp {\}(\w+):} $key -> kind
                    append key :$number
                    if {![dict exists $::write_dumps $kind]} continue
                    set by_field [expr {$kind eq "hash" && $slot != 7}]
                    R 0 restore $key [expr {$by_field ? 0 : 4}] [dict get $::write_dumps $kind] replace
                    if {!$by_field} continue
                    R 0 hset $key f0 v f1 2 f2 x f3 5 f4 "" counter 7 float 0.5
                    if {$slot == 6} {R 0 hset $key long [string repeat v 100]}
                    R 0 hpexpire $key 4 fields 7 f0 f1 f2 f3 f4 counter float
                }
                # Its error is one at the source, of which nothing is streamed.
                catch {R 0 {*}$argv} reply
                set ran($number) "$argv: $reply"
            }
        }
        end_writes
        # All these times are over; what was made to stay at the source stays at the target.
        R 0 debug set-active-expire 1
        wait_writes_settled 0 {5 6 7}
        assert_equal snapshot [job_field 0 $id state]
        if {[catch {compare_and_finish 2 target_before_section $id} error options]} {
            if {[regexp {key \S+:(\d+)} $error -> number]} {append error "\nafter $ran($number)"}
            return -options $options $error
        }
    }

    test "Writes that are of no slot neither reach the target nor disturb a job" {
        fresh
        R 2 function load replace {#!lua name=lib
            redis.register_function('mine', function() return 'of the target' end)}
        set id [start_held 0 source_before_cut streaming]
        R 0 function load replace {#!lua name=lib
            redis.register_function('mine', function() return 'of the source' end)}
        set dump [R 0 function dump]
        R 0 function delete lib
        R 0 function restore $dump flush
        R 0 function flush
        R 0 function restore $dump
        R 0 script load {return 1}
        R 0 publish channel message
        R 0 spublish [key_in 5 channel] message
        R 0 eval {return redis.call('publish','channel','message')} 0
        assert_error "*not allowed in cluster mode*" {R 0 move [key_in 5 k] 1}
        assert_error "*not allowed in cluster mode*" {R 0 swapdb 0 1}
        assert_equal 0 [job_field 0 $id stream-bytes]
        R 0 set [key_in 5 k] v
        compare_and_finish 0 source_before_cut $id
        assert_equal "of the target" [R 2 fcall mine 0]
        assert_equal "of the source" [R 0 fcall mine 0]
        foreach n {0 2} {R $n function flush}
    }

    test "MIGRATE of keys to a server outside of the cluster during a migration" {
        foreach {phase node point state} $::phases {
            fresh
            foreach name {a b c d} {R 0 set [key_in 5 $name] $phase}
            set id [start_held $node $point $state]
            assert_equal OK [R 0 migrate 127.0.0.1 $vanilla_port [key_in 5 a] 0 5000 replace]
            assert_equal OK [R 0 migrate 127.0.0.1 $vanilla_port "" 0 5000 replace keys [key_in 5 b] [key_in 5 c]]
            assert_equal OK [R 0 migrate 127.0.0.1 $vanilla_port [key_in 5 d] 0 5000 copy replace]
            assert_equal [list [key_in 5 d]] [dict keys [compare_and_finish $node $point $id]]
            assert_equal $phase [R 2 get [key_in 5 d]]
        }
    }

    test "A VADD CAS whose thread ends behind the hand-off is at the target, or is not acknowledged" {
        fresh
        # So many that the thread takes longer than fence, cut and commit.
        set key [key_in 5 vset]
        set vector {{} {binary format r* [lmap i [lrepeat 60 x] {expr {rand()}}]}}
        set rd [redis_deferring_client 0]
        for {set i 0} {$i < 5000} {incr i} {$rd vadd $key fp32 [apply $vector] first:$i noquant ef 10}
        for {set i 0} {$i < 5000} {incr i} {$rd read}
        $rd close
        set acked {}
        foreach {from to} {0 2 2 0 0 1} {
            set id [migrate $from $to 5 7]
            while {![catch {R $from vadd $key fp32 [apply $vector] last:[llength $acked] noquant cas ef 100000} reply]} {
                assert_equal 1 $reply
                lappend acked last:[llength $acked]
            }
            assert_match "MOVED *" $reply
            wait_migrated $from $to $id
            foreach element $acked {
                if {[R $to vemb $key $element] eq ""} {fail "$element of [llength $acked] was acknowledged and is lost"}
            }
            assert_equal [expr {5000+[llength $acked]}] [R $to vcard $key]
        }
    }

    test "Slow writes that come all at once are applied at the target in slices" {
        fresh
        set members {}
        for {set i 0} {$i < 50000} {incr i} {lappend members member:$i}
        R 0 sadd [key_in 5 set] {*}$members
        set id [start_held 0 source_before_cut streaming]
        stop_node 2
        set rd [redis_deferring_client 0]
        set started [clock milliseconds]
        for {set i 0} {$i < 100} {incr i} {$rd sunionstore [key_in 5 union] [key_in 5 set]}
        for {set i 0} {$i < 100} {incr i} {$rd read}
        set took [expr {[clock milliseconds]-$started}]
        $rd close
        set started [clock milliseconds]
        continue_node 2     ;# and asks it for something
        set longest [expr {[clock milliseconds]-$started}]
        wait_for_condition 10000 1 {
            [set started [clock milliseconds]; R 2 ping; set longest [expr {max($longest,[clock milliseconds]-$started)}]
             job_field 0 $id stream-lag-bytes] == 0
        } else {fail "the target lags: [job 0 $id]"}
        # Clients of the target do not wait for all of them.
        assert_lessthan $longest [expr {$took/2}]
        compare_and_finish 0 source_before_cut $id
    }

    test "A vector that VADD replaces during a migration is the new one at the target" {
        foreach {phase node point state} $::phases {
            fresh
            set key [key_in 5 vset]
            foreach {x y name} {1 0 a 0 1 b} {R 0 vadd $key values 2 $x $y $name noquant setattr {{"n":1}}}
            set id [start_held $node $point $state]
            assert_equal 0 [R 0 vadd $key values 2 0.25 4 a noquant setattr {{"n":2}}]
            compare_and_finish $node $point $id
            assert_equal {{"n":2}} [R 2 vgetattr $key a]
        }
    }

    # What a flush at the source leaves is what the target gets: the job goes on.
    # Keys are flushed in node 0 only, and those written later are there.
    foreach {phase node point state} [concat $::phases {"behind the fence" 0 source_before_commit fenced}] {
        foreach {form commands} {
            FLUSHALL            {{flushall}}
            "FLUSHDB ASYNC"     {{flushdb async}}
            "MULTI with FLUSHALL" {{multi} {set A 1} {rpush list:A x} {flushall} {set B 2} {rpush list:B y} {exec}}
            "A script with FLUSHALL" {{eval "redis.call('set',KEYS[1],1); redis.call('flushall'); return redis.call('set',KEYS[2],2)" 2 A B}}
        } {
            test "$form at the source $phase: the job goes on and brings what is left" {
                fresh
                fill_all_types 0 5
                fill_strings 0 {5 6 7} 1000
                R 0 set [key_in 100 other] 1
                R 2 set [key_in 16000 stays] 1
                set names [dict create A [key_in 5 A] B [key_in 5 B] list:A [key_in 5 list:A] list:B [key_in 5 list:B]]
                if {$state eq "fenced"} {
                    failpoint 0 $point pause
                    set id [migrate 0 2 5 7]
                    wait_job_state 0 $id fenced
                } else {
                    set id [start_held $node $point $state]
                    foreach slot {5 6 7} {
                        R 0 set [key_in $slot middle] 1
                        R 0 incr [key_in $slot k0]:counter
                    }
                }
                set rd [send_command 0 ping]
                $rd read
                foreach command $commands {
                    $rd {*}[lmap word $command {expr {[dict exists $names $word] ? [dict get $names $word] : $word}}]
                }
                set at_source 1
                if {$state eq "fenced"} {
                    # It has run, or waits.
                    wait_for_condition 500 10 {[string match *b* [client_flags 0 $rd]] || [R 0 exists [key_in 100 other]] == 0} else {
                        fail "the flush does neither run nor wait: [R 0 client list]"
                    }
                    failpoint 0 $point off
                }
                foreach command $commands {
                    set failed [catch {$rd read} reply]
                    # With keys in the moving slots it may be sent on to the target.
                    if {$failed && $state eq "fenced" && [regexp {\mA\M} $commands] && [regexp {^(MOVED|EXECABORT) } $reply]} {
                        set at_source 0
                        continue
                    }
                    assert_equal 0 $failed $reply
                }
                $rd close
                assert_equal [expr {!$at_source}] [R 0 exists [key_in 100 other]]
                if {!$at_source} {
                    foreach command $commands {
                        R 2 {*}[lmap word $command {expr {[dict exists $names $word] ? [dict get $names $word] : $word}}]
                    }
                }
                # Written after the flush, some of the names that were flushed.
                set expected [expr {[llength $commands] > 1 ? [list [key_in 5 B] [key_in 5 list:B]] :
                    [lindex $commands 0 0] eq "eval" ? [list [key_in 5 B]] : {}}]
                foreach command {
                    {set str:ttl again} {hset hash:lpttl f v} {hpexpire hash:lpttl 700000000 fields 1 f} {rpush list:ql only}
                    {xadd stream 1-1 f v} {set after 1} {vadd vset:q8 values 2 1 0 new}
                } {
                    set argv [lreplace $command 1 1 [key_in 5 [lindex $command 1]]]
                    if {[catch {R 0 {*}$argv} reply]} {
                        assert_match "MOVED *" $reply
                        R 2 {*}$argv
                    }
                    lappend expected [lindex $argv 1]
                }
                if {$state eq "fenced"} {
                    wait_migrated 0 2 $id
                } else {
                    compare_and_finish $node $point $id
                }
                assert_equal [lsort -unique $expected] [keys_in_slots 2 {5 6 7}]
                assert_equal $at_source [R 2 exists [key_in 16000 stays]]
                assert_equal [llength [keys_in_slots 2 {5 6 7 16000}]] [R 2 dbsize]
                if {$at_source} {assert_equal 0 [R 0 dbsize]}
                assert_equal 0 [keyspace_field 2 expires]
                wait_for_condition 500 10 {[keyspace_field 2 subexpiry] == 1} else {fail "[keyspace 2], expected one hash with field TTLs"}
                assert_equal {again only} [list [R 2 get [key_in 5 str:ttl]] [R 2 lrange [key_in 5 list:ql] 0 -1]]
            }
        }
    }

    test "Each of these writes changed something in one phase at least" {
        dict for {line phases} $::unlucky {
            assert_lessthan $phases [expr {[llength $::phases]/4}] "phases without a change: $line"
        }
    }

    foreach {phase node point state} $::phases {
        test "Random writes with flushes among them arrive, $phase" {
            fresh
            seed_writes [incr add]
            start_writes 0 $vanilla_port {5 6} 7
            write_decks 1
            set id [start_held $node $point $state]
            foreach flush {{{flushall}} {{multi} {flushdb} {exec}} {{eval {return redis.call('flushall')} 0}} {{flushall async}}} {
                set enough [expr {$::writes(units)+100}]
                write_decks 1 {$::writes(units) >= $enough}
                write_unit $flush 1
            }
            write_decks 1
            # Empty slots are not frozen: after a flush that phase may be over.
            if {$point ne "source_in_freeze"} {assert_equal $state [job_field 0 $id state]}
            assert_as_vanilla 0 $vanilla_port
            compare_and_finish $node $point $id
            assert_as_vanilla 2 $vanilla_port
            end_writes
        }
    }
}
}
