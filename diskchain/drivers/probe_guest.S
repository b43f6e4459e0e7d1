/* The probe guest of accel.py, one boot sector: what every 64-bit kernel does in its first second. QEMU ends with 33 when
 * all of it worked. The bytes stand in accel.py (tests/unit/drivers/test_accel.py compares them):
 *
 *     as --32 -o probe_guest.o probe_guest.S
 *     ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o probe_guest.bin probe_guest.o
 */
        .code16
        .globl _start
_start:
        cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp

        movw    $0x1000, %di            /* page tables (1000, 2000, 3000: the first 2 MiB, where they are), zeros, IDT */
        movw    $0x3000, %cx
        rep stosw
        movw    $0x2003, 0x1000
        movw    $0x3003, 0x2000
        movw    $0x0083, 0x3000

        lgdt    gdt_pointer
        movl    %cr4, %eax
        orw     $0x20, %ax              /* PAE */
        movl    %eax, %cr4
        movl    $0x1000, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER */
        rdmsr
        orw     $0x100, %ax             /* long mode */
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax       /* paging, protection */
        movl    %eax, %cr0
        ljmp    $8, $long_mode

        .code64
long_mode:
        movw    $16, %ax
        movw    %ax, %ss
        movl    $50000000, %ecx         /* the processor runs this in 0.05 s, an emulator of instructions in a minute */
1:      decl    %ecx
        jnz     1b

        movl    $0x5000, %edi           /* every 64-bit kernel has this one; some emulators have not */
        xorl    %eax, %eax
        xorl    %edx, %edx
        movl    $1, %ebx
        lock cmpxchg16b (%rdi)
        jnz     stop
        cmpl    $1, (%rdi)
        jne     stop

        movl    $0x6200, %edi           /* the gate of vector 32: the timer's, after the PIC is told so */
        movl    $(0x80000 + 0x7c00 + tick - _start), %eax
        stosl
        movl    $0x8e00, %eax
        stosl
        xorl    %eax, %eax
        stosl
        stosl
        lidt    idt_pointer(%rip)
        movb    $0x11, %al
        outb    %al, $0x20
        movb    $0x20, %al
        outb    %al, $0x21
        movb    $0x04, %al
        outb    %al, $0x21
        movb    $0x01, %al
        outb    %al, $0x21
        movb    $0xfe, %al
        outb    %al, $0x21
        sti
2:      hlt
        jmp     2b

tick:
        movw    $0xf4, %dx              /* isa-debug-exit: QEMU ends with (0x10 << 1) | 1 */
        movb    $0x10, %al
        outb    %al, %dx
stop:
        cli
        hlt
        jmp     stop

        .balign 8, 0
gdt:
        .quad   0
        .quad   0x00209a0000000000      /* 64-bit code */
        .quad   0x0000920000000000      /* data */
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt
idt_pointer:
        .word   0x20f
        .quad   0x6000

        .org    510
        .word   0xaa55
