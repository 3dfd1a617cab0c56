# benchplot.tcl -- line and bar charts as SVG, for utils/bench.
#
# A chart is one string, complete by itself; text is in the reader's own sans-serif.
# A series is {name colour points}, points a flat list of x and y. Of a bar chart: rows
# {label {{name value colour} ...}}, the values of a row behind one another.
#
# SPDX-License-Identifier: AGPL-3.0-only

namespace eval plot {
    variable width 860
    variable height 340
    variable left 78
    variable right 18
    variable top 58
    variable bottom 44
}

proc plot::escape {text} {string map {& &amp; < &lt; > &gt; \" &quot;} $text}

proc plot::number {v} {
    if {$v != 0 && abs($v) < 1} {return [string trimright [format %.3f $v] 0]}
    if {abs($v) >= 10000} {return [format %.0f $v]}
    return [string trimright [string trimright [format %.2f $v] 0] .]
}

proc plot::head {height title} {
    variable width
    return "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 $width $height\" width=\"$width\" height=\"$height\"\
        font-family=\"system-ui,sans-serif\" font-size=\"12\">\n<rect width=\"$width\" height=\"$height\" fill=\"#fff\"/>\n<text x=\"12\" y=\"20\"\
        font-size=\"14\" font-weight=\"600\" fill=\"#222\">[escape $title]</text>\n"
}

proc plot::legend {entries} {
    set out ""
    set x 12
    foreach {name colour} $entries {
        append out "<rect x=\"$x\" y=\"31\" width=\"14\" height=\"10\" rx=\"2\" fill=\"$colour\"/><text x=\"[expr {$x+19}]\" y=\"40\" fill=\"#333\">[escape $name]</text>\n"
        incr x [expr {36 + 7*[string length $name]}]
    }
    return $out
}

# About `most` round numbers that cover low..high.
proc plot::ticks {low high most} {
    set span [expr {max(1e-9,double($high-$low))}]
    set step [expr {pow(10,floor(log10($span/$most)))}]
    foreach by {1 2 5 10} {
        if {$span/($step*$by) <= $most} {set step [expr {$step*$by}]; break}
    }
    set list {}
    for {set v [expr {ceil($low/$step-1e-9)*$step}]} {$v <= $high+$step*1e-6} {set v [expr {$v+$step}]} {
        lappend list [expr {abs($v) < $step/1e6 ? 0 : $v}]
    }
    return $list
}

# options: log (of y) 0|1, mark {x text ...}
proc plot::lines {title xlabel ylabel series args} {
    variable width; variable height; variable left; variable right; variable top; variable bottom
    array set o {log 0 from "" to "" mark {}}
    array set o $args
    set xs {}; set ys {}
    foreach one $series {
        foreach {x y} [lindex $one 2] {
            if {($o(from) ne "" && $x < $o(from)) || ($o(to) ne "" && $x > $o(to))} continue
            lappend xs $x
            lappend ys $y
        }
    }
    if {![llength $xs]} {return ""}
    set x0 [expr {$o(from) ne "" ? $o(from) : [tcl::mathfunc::min {*}$xs]}]
    set x1 [expr {min([expr {$o(to) ne "" ? $o(to) : 1e18}],[tcl::mathfunc::max {*}$xs])}]
    set y1 [expr {[tcl::mathfunc::max {*}$ys]}]
    set y0 [expr {[tcl::mathfunc::min {*}$ys]}]
    if {$x1 <= $x0} {set x1 [expr {$x0+1}]}
    if {$o(log)} {
        set y0 [expr {pow(10,floor(log10(max($y0,0.01))))}]
        set y1 [expr {pow(10,ceil(log10(max($y1,$y0*10))))}]
    } else {
        set y0 [expr {min(0,$y0)}]
        if {$y1 <= $y0} {set y1 [expr {$y0+1}]}
    }
    set w [expr {$width-$left-$right}]
    set h [expr {$height-$top-$bottom}]
    set out [head $height $title]
    set entries {}
    foreach one $series {lappend entries [lindex $one 0] [lindex $one 1]}
    append out [legend $entries]
    if {$o(log)} {
        set marks {}
        for {set v $y0} {$v <= $y1*1.001} {set v [expr {$v*10}]} {lappend marks $v}
    } else {
        set marks [ticks $y0 $y1 6]
    }
    foreach v $marks {
        set py [format %.1f [yOf $v $y0 $y1 $o(log) $h]]
        append out "<line x1=\"$left\" x2=\"[expr {$left+$w}]\" y1=\"$py\" y2=\"$py\" stroke=\"#e2e2e2\"/><text x=\"[expr {$left-6}]\" y=\"[expr {$py+4}]\" text-anchor=\"end\" fill=\"#555\">[number $v]</text>\n"
    }
    foreach v [ticks $x0 $x1 10] {
        set px [format %.1f [expr {$left+$w*($v-$x0)/($x1-$x0)}]]
        append out "<line x1=\"$px\" x2=\"$px\" y1=\"[expr {$top+$h}]\" y2=\"[expr {$top+$h+4}]\" stroke=\"#999\"/><text x=\"$px\" y=\"[expr {$top+$h+18}]\" text-anchor=\"middle\" fill=\"#555\">[number $v]</text>\n"
    }
    append out "<rect x=\"$left\" y=\"$top\" width=\"$w\" height=\"$h\" fill=\"none\" stroke=\"#999\"/>\n"
    foreach {x text colour} $o(mark) {
        if {$x < $x0 || $x > $x1} continue
        set px [format %.1f [expr {$left+$w*($x-$x0)/($x1-$x0)}]]
        append out "<line x1=\"$px\" x2=\"$px\" y1=\"$top\" y2=\"[expr {$top+$h}]\" stroke=\"$colour\" stroke-dasharray=\"4 3\"><title>[escape $text]</title></line>\n"
    }
    foreach one $series {
        lassign $one name colour points
        set path {}
        foreach {x y} $points {
            if {$x < $x0 || $x > $x1} continue
            lappend path [format %.1f,%.1f [expr {$left+$w*($x-$x0)/double($x1-$x0)}] [yOf $y $y0 $y1 $o(log) $h]]
        }
        append out "<polyline fill=\"none\" stroke=\"$colour\" stroke-width=\"1.6\" stroke-linejoin=\"round\" points=\"[join $path { }]\"><title>[escape $name]</title></polyline>\n"
    }
    append out "<text x=\"[expr {$left+$w/2}]\" y=\"[expr {$height-8}]\" text-anchor=\"middle\" fill=\"#333\">[escape $xlabel]</text>\n"
    append out "<text transform=\"translate(16 [expr {$top+$h/2}]) rotate(-90)\" text-anchor=\"middle\" fill=\"#333\">[escape $ylabel]</text>\n</svg>\n"
}

proc plot::yOf {v y0 y1 log h} {
    variable top
    if {$log} {
        set share [expr {(log10(max($v,$y0))-log10($y0))/(log10($y1)-log10($y0))}]
    } else {
        set share [expr {double($v-$y0)/($y1-$y0)}]
    }
    expr {$top+$h*(1-$share)}
}

# Values below zero are drawn as nothing; the numbers are written behind each bar.
proc plot::bars {title unit rows} {
    variable width; variable right
    set left 150
    set most 0
    array set colours {}
    set order {}
    foreach row $rows {
        set sum 0
        foreach part [lindex $row 1] {
            lassign $part name value colour
            set sum [expr {$sum+max(0,$value)}]
            if {![info exists colours($name)]} {
                lappend order $name $colour
                set colours($name) $colour
            }
        }
        set most [expr {max($most,$sum)}]
    }
    if {$most <= 0} {return ""}
    set height [expr {72+28*[llength $rows]}]
    set w [expr {$width-$left-$right-90}]
    set out [head $height $title]
    append out [legend $order]
    set y 58
    foreach row $rows {
        append out "<text x=\"[expr {$left-8}]\" y=\"[expr {$y+14}]\" text-anchor=\"end\" fill=\"#222\">[escape [lindex $row 0]]</text>\n"
        set x $left
        set sum 0
        foreach part [lindex $row 1] {
            lassign $part name value colour
            set v [expr {max(0,$value)}]
            set len [expr {double($w)*$v/$most}]
            append out "<rect x=\"[format %.1f $x]\" y=\"$y\" width=\"[format %.1f $len]\" height=\"20\" fill=\"$colour\"><title>[escape $name]: [number $value] $unit</title></rect>\n"
            set x [expr {$x+$len}]
            set sum [expr {$sum+$v}]
        }
        append out "<text x=\"[format %.1f [expr {$x+6}]]\" y=\"[expr {$y+14}]\" fill=\"#333\">[number $sum] $unit</text>\n"
        incr y 28
    }
    append out "</svg>\n"
}
