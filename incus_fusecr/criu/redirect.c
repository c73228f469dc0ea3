// SPDX-License-Identifier: GPL-2.0-only
/* Changes where CRIU's imports lead to: the slots of its global offset table, found by the dynamic section. */
#define _GNU_SOURCE
#include "redirect.h"

#include <elf.h>
#include <errno.h>
#include <link.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "log.h"

#if defined(__x86_64__)
#define R_JUMP_SLOT R_X86_64_JUMP_SLOT
#define R_GLOB_DAT R_X86_64_GLOB_DAT
#elif defined(__aarch64__)
#define R_JUMP_SLOT R_AARCH64_JUMP_SLOT
#define R_GLOB_DAT R_AARCH64_GLOB_DAT
#else
#error "the relocation types of this architecture are not known here"
#endif

#define SLOTS_MAX 64		/* Debian's CRIU has one for each function */

struct import {
	const char *name;
	void *function;		/* what to call instead */
	int slots;		/* how many were redirected, or -errno */
};

/* What stood in each slot that was changed, and the page protection that it has. */
static struct {
	void **slot;
	void *function;
	bool protected;
} changed[SLOTS_MAX];
static size_t changed_count;

/* The dynamic section's values that name the imports. */
struct dynamic {
	const ElfW(Sym) *symbols;
	const char *strings;
	const ElfW(Rela) *jumps, *relocations;
	size_t jumps_size, relocations_size;	/* bytes */
};

/* glibc has added the load address to the pointers in the dynamic section, other libcs have not. */
static const void *dynamic_pointer(const struct dl_phdr_info *program, ElfW(Addr) value)
{
	return (const void *)(value < program->dlpi_addr ? value + program->dlpi_addr : value);
}

static struct dynamic read_dynamic(const struct dl_phdr_info *program, const ElfW(Dyn) *entry)
{
	struct dynamic found = { 0 };

	for (; entry->d_tag != DT_NULL; entry++) {
		const void *pointer = dynamic_pointer(program, entry->d_un.d_ptr);

		switch (entry->d_tag) {
		case DT_SYMTAB:
			found.symbols = pointer;
			break;
		case DT_STRTAB:
			found.strings = pointer;
			break;
		case DT_JMPREL:
			found.jumps = pointer;
			break;
		case DT_PLTRELSZ:
			found.jumps_size = entry->d_un.d_val;
			break;
		case DT_RELA:
			found.relocations = pointer;
			break;
		case DT_RELASZ:
			found.relocations_size = entry->d_un.d_val;
			break;
		}
	}
	return found;
}

static int store(void **slot, void *value, bool protected)
{
	uintptr_t size = sysconf(_SC_PAGESIZE);
	void *page = (void *)((uintptr_t)slot & -size);

	if (protected && mprotect(page, size, PROT_READ | PROT_WRITE))
		return -errno;
	__atomic_store_n(slot, value, __ATOMIC_RELEASE);
	if (protected && mprotect(page, size, PROT_READ))
		return -errno;
	return 0;
}

/* With -z now (PT_GNU_RELRO) the dynamic linker has made the slot's page read-only: so it is again afterwards. */
static int write_slot(const ElfW(Phdr) *relro, ElfW(Addr) load, void **slot, void *value)
{
	uintptr_t size = sysconf(_SC_PAGESIZE), page = (uintptr_t)slot & -size;
	uintptr_t start = relro ? (load + relro->p_vaddr) & -size : 0;
	uintptr_t end = relro ? (load + relro->p_vaddr + relro->p_memsz) & -size : 0;
	bool protected = page >= start && page < end;

	if (changed_count == SLOTS_MAX)
		return -ENOSPC;
	changed[changed_count].slot = slot;
	changed[changed_count].function = *slot;
	changed[changed_count++].protected = protected;
	return store(slot, value, protected);
}

static int redirect_in(const struct dl_phdr_info *program, const ElfW(Phdr) *relro, const struct dynamic *dynamic,
		       const ElfW(Rela) *table, size_t size, const struct import *import)
{
	size_t i;
	int error, slots = 0;

	for (i = 0; table && i < size / sizeof(*table); i++) {
		unsigned int type = ELF64_R_TYPE(table[i].r_info);
		const ElfW(Sym) *symbol = &dynamic->symbols[ELF64_R_SYM(table[i].r_info)];

		if ((type != R_JUMP_SLOT && type != R_GLOB_DAT) ||
		    strcmp(dynamic->strings + symbol->st_name, import->name) != 0)
			continue;
		error = write_slot(relro, program->dlpi_addr, (void **)(program->dlpi_addr + table[i].r_offset),
				   import->function);
		if (error)
			return error;
		slots++;
	}
	return slots;
}

/* A callback of dl_iterate_phdr(), which begins with the program itself. */
static int redirect_import(struct dl_phdr_info *program, size_t size, void *data)
{
	const ElfW(Phdr) *header = program->dlpi_phdr, *end = header + program->dlpi_phnum, *relro = NULL;
	struct import *import = data;
	struct dynamic dynamic = { 0 };
	int lazy, bound;

	(void)size;
	for (; header < end; header++) {
		if (header->p_type == PT_GNU_RELRO)
			relro = header;
		else if (header->p_type == PT_DYNAMIC)
			dynamic = read_dynamic(program, (ElfW(Dyn) *)(program->dlpi_addr + header->p_vaddr));
	}
	if (!dynamic.symbols || !dynamic.strings)
		return 1;
	lazy = redirect_in(program, relro, &dynamic, dynamic.jumps, dynamic.jumps_size, import);
	bound = redirect_in(program, relro, &dynamic, dynamic.relocations, dynamic.relocations_size, import);
	import->slots = lazy < 0 ? lazy : bound < 0 ? bound : lazy + bound;
	return 1;
}

void redirect(const char *name, void *function, const char *reason)
{
	struct import import = { .name = name, .function = function };

	dl_iterate_phdr(redirect_import, &import);
	if (import.slots > 0)
		pr_info("%s() of CRIU goes through the plugin: %s", name, reason);
	else
		pr_warn("cannot redirect %s() of CRIU (%s), which may fail: %s", name,
			import.slots ? strerror(-import.slots) : "no such import", reason);
}

void redirect_undo(void)
{
	int error;

	while (changed_count > 0) {
		changed_count--;
		error = store(changed[changed_count].slot, changed[changed_count].function, changed[changed_count].protected);
		if (error)
			pr_err("cannot lead an import of CRIU back to libc: %s", strerror(-error));
	}
}
