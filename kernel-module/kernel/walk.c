// SPDX-License-Identifier: GPL-2.0-only
/*
 * Page tables: every step through them is a macro or an inline function, and no function that walks them is exported.
 *
 * A PFN is all that is wanted. get_user_pages_remote would take a reference to every page and drop it again, which costs several
 * times what /proc/PID/pagemap does, and holds pages that the kernel may want to move. So this reads as gup_fast (mm/gup.c) does:
 * with interrupts off no page table is freed, each entry is read once, and what is read may be stale a moment later.
 */
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include "shim.h"

#define NOT_RAM (~0ULL)			/* kernel_module::NOT_RAM */
#define NOT_MAPPED (~0ULL - 1)

/* Pages with a struct page that are the kernel's image, holes, or a device's are no RAM of the guest's. */
static u64 pfn_if_ram(u64 pfn)
{
	struct page *page = pfn_to_page(pfn);
	return PageReserved(page) || is_zone_device_page(page) ? NOT_RAM : pfn;
}

/*
 * The PFN at an address. pte_special: the zero page, or no struct page at all. Under PV the accessors give the guest's own
 * (pseudo-physical) PFN. *table is that of the addresses' 2 MiB for the next call, NULL where a huge page or nothing is mapped.
 */
static u64 look_up(struct mm_struct *mm, u64 address, pte_t **table)
{
	pte_t pte;
	if (!*table || !pte_index(address)) {
		pgd_t pgd = READ_ONCE(*pgd_offset(mm, address));
		p4d_t p4d = pgd_none(pgd) ? __p4d(0) : READ_ONCE(*p4d_offset(&pgd, address));
		pud_t pud = p4d_present(p4d) ? READ_ONCE(*pud_offset(&p4d, address)) : __pud(0);
		bool huge = pud_present(pud) && pud_leaf(pud);	/* 1 GiB */
		pmd_t pmd = pud_present(pud) && !huge ? READ_ONCE(*pmd_offset(&pud, address)) : __pmd(0);

		*table = NULL;
		if (huge)
			return pfn_if_ram(pud_pfn(pud) + ((address & ~PUD_MASK) >> PAGE_SHIFT));
		if (!pmd_present(pmd))
			return NOT_MAPPED;
		if (pmd_leaf(pmd))
			return pfn_if_ram(pmd_pfn(pmd) + pte_index(address));
		*table = pte_offset_kernel(&pmd, 0);
	}
	pte = READ_ONCE((*table)[pte_index(address)]);
	if (!pte_present(pte))
		return NOT_MAPPED;
	return pte_special(pte) ? NOT_RAM : pfn_if_ram(pte_pfn(pte));
}

long shim_translate(struct mm_struct *mm, u64 address, u64 *pfns, size_t count)
{
	pte_t *table = NULL;
	unsigned long flags;
	size_t i;

	cond_resched();
	if (fatal_signal_pending(current) || mmap_read_lock_killable(mm))
		return -EINTR;
	local_irq_save(flags);
	for (i = 0; i < count && address < TASK_SIZE_MAX; i++, address += PAGE_SIZE) {
		pfns[i] = look_up(mm, address, &table);
		if (pfns[i] == NOT_MAPPED)
			break;
	}
	local_irq_restore(flags);
	mmap_read_unlock(mm);
	return i;
}
